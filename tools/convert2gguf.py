"""Write a Hugging Face folder of ours as one GGUF file, for llama.cpp."""

import argparse
import sys

from internlm_mm.checkpoint.gguf import DTYPES, write_gguf
from internlm_mm.utils.arguments import Arguments


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 if the file was written, 2 if not."""
    args = parse_args(argv)
    try:
        write_gguf(
            args.folder,
            args.out,
            dtype=args.dtype,
            overwrite=args.overwrite,
            show_progress=sys.stderr.isatty(),
        )
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print(f'written: {args.out}')
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Arguments(
        prog='convert2gguf',
        description='Write weights, tokenizer and chat template of a Hugging Face folder, as '
        'convert2hf makes it, to one GGUF file.',
    )
    parser.add_argument('folder', help='a Hugging Face folder of the form llama')
    parser.add_argument('out', help='the .gguf file to make')
    dtype_help = 'of the matrices (default: what config.json names); vectors are f32'
    parser.add_argument('--dtype', choices=DTYPES, help=dtype_help)
    parser.add_argument('--overwrite', action='store_true', help='replace OUT if it exists')
    return parser.parse_args(argv)


if __name__ == '__main__':
    sys.exit(main())
