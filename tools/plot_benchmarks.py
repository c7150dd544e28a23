"""Draw records of tools/benchmark.py side by side: speed, where a step's time goes, memory."""

import sys
from collections.abc import Sequence
from pathlib import Path

from internlm_mm.engine.benchmark_plots import draw_records, read_records
from internlm_mm.utils.arguments import Arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    parser = Arguments(prog='plot_benchmarks.py', description=__doc__)
    parser.add_argument('records', nargs='+', type=Path, metavar='RECORD.json')
    parser.add_argument('--labels', nargs='+', metavar='NAME', help='one for each record')
    parser.add_argument('--out', type=Path, required=True, metavar='PNG', help='where to draw')
    args = parser.parse_args(argv)
    try:
        print(draw_records(read_records(args.records, args.labels), args.out))
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
