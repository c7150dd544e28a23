"""Make a checkpoint of a Hugging Face folder or of InternLM's own shards."""

import argparse
import sys

from internlm_mm.checkpoint.convert_from import convert_from
from internlm_mm.checkpoint.foreign import FORMATS
from internlm_mm.checkpoint.hf_files import DTYPES
from internlm_mm.utils.arguments import Arguments
from internlm_mm.utils.config import parse_cfg_options


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 if OUT was made, 2 if not."""
    args = parse_args(argv)
    try:
        done = convert_from(
            args.source,
            args.out,
            format=args.format,
            dtype=args.dtype,
            tokenizer=args.tokenizer,
            settings=parse_cfg_options(args.set, '--set'),
            overwrite=args.overwrite,
            show_progress=sys.stderr.isatty(),
        )
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    words = f'a tokenizer of {done.vocabulary:,}' if done.vocabulary else 'no tokenizer'
    print(f'{done.family}, {done.parameters:,} parameters in {done.dtype}, {words}; {done.form}')
    print(f'written: {args.out}')
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Arguments(
        prog='convert_from',
        description='Make OUT, a work dir with the checkpoint iter_0, of weights that another '
        'program has trained. train (load_from), chat, test and convert2hf take it.',
    )
    parser.add_argument('source', help="a Hugging Face folder or one of InternLM's shards")
    parser.add_argument('out', help='the work dir to make')
    parser.add_argument(
        '--format',
        choices=FORMATS,
        default='auto',
        help='what SOURCE is; internlm-2023 and internevo differ in what a first-generation '
        "InternLM's w2 is, which shapes tell in nearly all cases",
    )
    parser.add_argument('--dtype', choices=DTYPES, help='of the weights (default: as they are)')
    tokenizer_help = 'a .model file or a tokenizer folder; by default the one in SOURCE, if any'
    parser.add_argument('--tokenizer', help=tokenizer_help)
    parser.add_argument(
        '--set',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='what SOURCE does not tell or tells wrongly, as num_heads=32 or max_seq_len=8192; '
        'arguments of the model, and adapt_hf and norm_head of InternEvo',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace OUT if it exists')
    return parser.parse_args(argv)


if __name__ == '__main__':
    sys.exit(main())
