"""Make a config of ours out of InternLM's `7B_sft.py` or an InternEvo config, key by key."""

import sys

from internlm_mm.utils.arguments import Arguments
from internlm_mm.utils.config_draft import table
from internlm_mm.utils.internlm_config import convert_config


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 if the config was written, 2 if not."""
    parser = Arguments(
        prog='convert_config',
        description='Read an InternLM or InternEvo config without running it, write one of ours, '
        'and print what became of every key.',
    )
    parser.add_argument('config', help='InternLM config, such as configs/7B_sft.py')
    parser.add_argument('out', help='the config to write, a .py file')
    parser.add_argument('--data', help='tokens made by tools/preprocess_data.py')
    parser.add_argument('--tokenizer', help='what made them (default: as recorded there)')
    parser.add_argument('--gpus', type=int, help='of the job; decides the size of a step')
    parser.add_argument('--overwrite', action='store_true', help='replace OUT if it exists')
    args = parser.parse_args(argv)
    try:
        rows = convert_config(
            args.config,
            args.out,
            data=args.data,
            tokenizer=args.tokenizer,
            gpus=args.gpus,
            overwrite=args.overwrite,
        )
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print(table(rows))
    counts = ', '.join(
        f'{sum(row.status == status for row in rows)} {status}'
        for status in ('mapped', 'changed', 'dropped', 'unknown')
    )
    print(f'written: {args.out} ({counts})')
    return 0


if __name__ == '__main__':
    sys.exit(main())
