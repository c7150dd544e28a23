"""Train a SentencePiece tokenizer, in InternLM's manner, on your texts."""

import argparse
import sys

from internlm_mm.datasets.documents import sample_texts
from internlm_mm.tokenizers.training import train_tokenizer
from internlm_mm.utils.arguments import Arguments

EXAMPLES = """examples:
  python tools/train_tokenizer.py texts/ --output data/text/tokenizer --vocab-size 32000
  python tools/train_tokenizer.py a.jsonl b.parquet --text-key content \\
      --output my.model --vocab-size 103168 --symbols '<|im_start|>' '<|im_end|>'
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 if the tokenizer was written."""
    parser = Arguments(
        prog='train_tokenizer',
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'inputs', nargs='+', help='files and folders of txt, json, jsonl, jsonl.gz, parquet'
    )
    parser.add_argument(
        '--output', '-o', required=True, help='a .model file, or a folder for tokenizer.model'
    )
    parser.add_argument('--vocab-size', type=int, required=True, help='ids, special ones included')
    parser.add_argument('--text-key', default='text', help="a record's text (default: text)")
    parser.add_argument(
        '--max-megabytes',
        type=float,
        default=200,
        help='train on about this much of the inputs, evenly thinned out (default: 200)',
    )
    parser.add_argument(
        '--character-coverage',
        type=float,
        default=0.9999,
        help='share of characters that get an id; others become bytes (default: 0.9999)',
    )
    parser.add_argument('--symbols', nargs='+', default=[], help='strings that are always one id')
    parser.add_argument('--num-threads', type=int, default=2)
    parser.add_argument('--overwrite', action='store_true', help='replace an existing output')
    args = parser.parse_args(argv)
    try:
        tokenizer = train_tokenizer(
            sample_texts(
                args.inputs, text_key=args.text_key, max_bytes=int(args.max_megabytes * 1e6)
            ),
            args.output,
            vocab_size=args.vocab_size,
            user_defined_symbols=args.symbols,
            character_coverage=args.character_coverage,
            num_threads=args.num_threads,
            overwrite=args.overwrite,
        )
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print(f'{tokenizer.path}: {tokenizer.vocab_size:,} ids')
    return 0


if __name__ == '__main__':
    sys.exit(main())
