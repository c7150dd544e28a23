"""Write 4-bit weights (AWQ) as plain ones again, to measure with `test` what the 4 bits cost."""

import argparse
import sys

import torch

from internlm_mm.checkpoint.awq import dequantise
from internlm_mm.checkpoint.hf_files import DTYPES
from internlm_mm.utils.arguments import Arguments


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 if the folder was written, 2 if not."""
    args = parse_args(argv)
    try:
        dequantise(
            args.folder,
            args.out,
            dtype=getattr(torch, args.dtype),
            overwrite=args.overwrite,
            show_progress=sys.stderr.isatty(),
        )
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print(f'written: {args.out}')
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Arguments(
        prog='dequantise',
        description='Write a Hugging Face folder of AWQ weights, as lmdeploy lite auto_awq makes '
        'it, as one of plain weights that computes the same.',
    )
    parser.add_argument('folder', help='a folder whose config.json says quant_method awq')
    parser.add_argument('out', help='the folder to make')
    parser.add_argument('--dtype', choices=DTYPES, default='float32', help='of the weights')
    parser.add_argument('--overwrite', action='store_true', help='replace OUT if it exists')
    return parser.parse_args(argv)


if __name__ == '__main__':
    sys.exit(main())
