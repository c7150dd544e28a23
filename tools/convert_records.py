"""Write conversations of any form as OpenAI's messages, or messages in another form."""

import argparse
import sys

from internlm_mm.datasets.conversation import ON_ERROR
from internlm_mm.datasets.conversation_formats import FORMATS
from internlm_mm.datasets.converting import WRITERS, convert_files
from internlm_mm.utils.arguments import Arguments

EXAMPLES = """what the other form cannot hold is kept under 'source', so that nothing is lost

examples:
  python tools/convert_records.py toolbench.json --output data/chat/toolbench.jsonl
  python tools/convert_records.py traces.jsonl --to sharegpt --output traces_sharegpt.jsonl
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; 2 if a file or a record cannot be converted."""
    parser = Arguments(
        prog='convert_records',
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('files', nargs='+', help='.json, .jsonl, .jsonl.gz or .parquet')
    parser.add_argument('--output', required=True, metavar='FILE.jsonl')
    parser.add_argument(
        '--format', default='auto', help=f'auto (by the keys), {", ".join(FORMATS)}'
    )
    parser.add_argument('--to', default='messages', help=', '.join(WRITERS))
    parser.add_argument(
        '--on-error', default='raise', choices=ON_ERROR, help='skip: leave out what is malformed'
    )
    parser.add_argument('--overwrite', action='store_true', help='replace an output that is there')
    args = parser.parse_args(argv)
    try:
        counts = convert_files(
            args.files,
            args.output,
            form=args.format,
            to=args.to,
            on_error=args.on_error,
            overwrite=args.overwrite,
        )
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    forms = ', '.join(f'{count:,} {form}' for form, count in counts.forms.items())
    print(f'{args.output}: {counts.written:,} records as {args.to} ({forms or "none"})')
    for message in counts.messages:
        print(f'left out: {message}', file=sys.stderr)
    if counts.skipped > len(counts.messages):
        print(f'... and {counts.skipped - len(counts.messages):,} more', file=sys.stderr)
    return 0


if __name__ == '__main__':
    sys.exit(main())
