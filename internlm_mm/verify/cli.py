"""The command line of verification: options, progress, exit codes."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from internlm_mm.engine.start import adopt_model
from internlm_mm.utils.arguments import Arguments
from internlm_mm.utils.config import ConfigError, load_config, parse_cfg_options
from internlm_mm.utils.config_check import check_config
from internlm_mm.utils.device import dtype_of
from internlm_mm.verify.grid import as_json, render, render_rest, write_json
from internlm_mm.verify.layouts import default_cases, parse_case
from internlm_mm.verify.shrink import default_precision
from internlm_mm.verify.verification import PAIRS, Report, Verification, default_processes

HALF = ('bfloat16', 'float16')
"""Precisions in which rounding is as large as some errors."""

USER_ERRORS = (ConfigError, ValueError, TypeError, FileNotFoundError, KeyError, ImportError)
"""Raised while everything is prepared, with a message that needs no traceback."""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of `tools/verify_parallel.py`."""
    parser = Arguments(
        prog='verify_parallel.py',
        description='Prove that a config trains the same on every layout as in one process.',
        epilog="Examples: verify_parallel.py my.py; verify_parallel.py my.py --layouts 'tensor=2' "
        "'pipeline=2,schedule=interleaved_1f1b,data_shard=2' --precision float64,bfloat16. "
        'Exit code 0: all the same; 1: something deviates; 2: it could not be tried.',
    )
    parser.add_argument('config', help='a config file, or the name of a shipped one')
    parser.add_argument(
        '--layouts', nargs='+', metavar='LAYOUT', help="'tensor=2,data_shard=2'; all that fit"
    )
    parser.add_argument(
        '--processes',
        type=int,
        metavar='N',
        help='GPUs, or 4 on the CPU, by default; more than GPUs share them',
    )
    parser.add_argument('--device', choices=('cpu', 'cuda'), help='GPUs where there are any')
    parser.add_argument(
        '--precision', metavar='DTYPE,...', help="float64, float32, bfloat16; the config's own"
    )
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all cells into a file')
    parser.add_argument(
        '--random-data', action='store_true', help="random tokens in place of the config's data"
    )
    parser.add_argument(
        '--resume-pairs', choices=PAIRS, default='ring', help='which checkpoints go where (ring)'
    )
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory(prefix='verify_') as folder:
        try:
            verification = prepare(args, Path(folder))
        except USER_ERRORS as error:
            message = error.args[0] if isinstance(error, KeyError) and error.args else error
            print(f'{type(error).__name__}: {message}', file=sys.stderr)
            if isinstance(error, FileNotFoundError) and 'dataset' in str(error):
                print('To verify without data: --random-data', file=sys.stderr)
            return 2
        for note in verification.small.notes:
            print(note, file=sys.stderr)
        try:
            reports = verification.run(lambda line: print(line, file=sys.stderr, flush=True))
        except ValueError as error:
            print(f'ValueError: {error}', file=sys.stderr)
            return 2
    for report in reports:
        title = f'{args.config} in {report.precision} on {verification.device}: '
        title += 'largest relative difference from one process of plain torch in float64'
        print(render(title, report.cells, report.errors), end='\n\n')
    rest = render_rest(reports[0].skipped, reports[0].errors)
    if rest:
        print(rest.strip('\n'), end='\n\n')
    if args.json is not None:
        write_json(
            args.json,
            [
                as_json(args.config, r.precision, verification.device, r.cells, r.skipped, r.errors)
                for r in reports
            ],
        )
    failed = sum(not cell.passed for report in reports for cell in report.cells)
    count = sum(len(report.cells) for report in reports)
    coarse = [r.precision for r in reports if r.precision in HALF and _deviates(r)]
    if coarse and 'float64' not in {report.precision for report in reports}:
        print(f'In {coarse[0]} this may be rounding: --precision float64 tells it from an error')
    print(f'{failed} of {count} checks failed' if failed else f'all {count} checks passed')
    return 1 if failed else 0


def _deviates(report: Report) -> bool:
    """Whether a layout that ran differs in its numbers."""
    return any(not c.passed and c.layout not in report.errors for c in report.cells)


def prepare(args: argparse.Namespace, folder: Path) -> Verification:
    """Check everything a user may have got wrong, and train the reference.

    Args:
        args: From `parse_args`.
        folder: Scratch space.
    """
    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    if device == 'cuda' and not torch.cuda.is_available():
        raise ValueError('--device cuda: there is no GPU here; --device cpu')
    processes = default_processes(device) if args.processes is None else args.processes
    if processes < 1:
        raise ValueError(f'--processes {processes} must be at least 1')
    config = load_config(args.config, parse_cfg_options(args.cfg_options))
    adopt_model(config)
    config.load_from = None  # of the whole model; what is verified is small, and drawn
    check_config(config)
    cases = (
        default_cases(processes, device)
        if args.layouts is None
        else [parse_case(text) for text in args.layouts]
    )
    asked = args.precision or default_precision(config.get('strategy') or {})
    precisions = asked.split(',')
    for name in precisions:
        dtype_of(name, '--precision')
    return Verification(
        config,
        cases,
        precisions,
        folder,
        device=device,
        processes=processes,
        random_data=args.random_data,
        pairs=args.resume_pairs,
    )
