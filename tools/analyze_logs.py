"""Draw and summarise what runs have logged: `tools/analyze_logs.py WORK_DIR... --out c.png`."""

import sys

from internlm_mm.utils.arguments import Arguments
from internlm_mm.utils.curves import X_AXES, draw_curves, summary_table
from internlm_mm.utils.differences import difference_table


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    parser = Arguments(prog='analyze_logs', description=__doc__)
    parser.add_argument('work_dirs', nargs='+', metavar='WORK_DIR', help='runs to compare')
    parser.add_argument('--keys', nargs='+', default=['loss'], help='scalars: loss val/loss lr')
    parser.add_argument('--x', choices=X_AXES, default='iter', help='what to draw over')
    parser.add_argument('--smooth', type=int, default=1, metavar='N', help='average over N points')
    parser.add_argument('--out', metavar='PNG', help='draw curves into this file')
    parser.add_argument('--summary', action='store_true', help='print a table; the default alone')
    parser.add_argument(
        '--differences', action='store_true', help='print how far every two runs lie apart'
    )
    parser.add_argument(
        '--last', type=float, default=0.25, metavar='SHARE', help='of the steps, for --differences'
    )
    args = parser.parse_args(argv)
    try:
        if args.differences:
            print(difference_table(args.work_dirs, args.keys, args.last, args.smooth))
        if args.summary or not (args.out or args.differences):
            print(summary_table(args.work_dirs, args.keys))
        if args.out:
            print(draw_curves(args.work_dirs, args.keys, args.out, args.x, args.smooth))
    except (OSError, ValueError, KeyError) as error:
        print(f'error: {error.args[0] if isinstance(error, KeyError) else error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
