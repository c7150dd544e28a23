"""Perplexity and tasks of a model: `tools/test.py CHECKPOINT|HF`, or `CONFIG CHECKPOINT|HF`."""

import argparse
import contextlib
import json
import sys
import traceback

from internlm_mm.engine.evaluate import evaluate, metrics_table
from internlm_mm.engine.last_words import JobParser, tell_once
from internlm_mm.engine.train_cli import MISTAKE_EXIT_CODE, USER_ERRORS
from internlm_mm.utils.config import parse_cfg_options
from internlm_mm.utils.launch import LAUNCHERS


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit code: 0, or 2 after a mistake in what was asked."""
    args = parse_args(argv)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # of the log: what is found stands alone
            result = evaluate(
                args.target,
                checkpoint=_weights(args),
                data=args.data,
                output=args.output,
                options=parse_cfg_options(args.cfg_options),
                launcher=args.launcher,
            )
    except USER_ERRORS as error:
        if args.traceback:
            traceback.print_exc()
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        tell_once(f'error: {message}')
        return MISTAKE_EXIT_CODE
    if result.pop('rank') == 0:
        print(json.dumps(result) if args.json else f'{result["weights"]}\n{metrics_table(result)}')
    return 0


def _weights(args: argparse.Namespace) -> str | None:
    """What is named after the config, or by --checkpoint."""
    if args.weights is not None and args.checkpoint is not None:
        raise ValueError(f'two weights are named: {args.weights} and {args.checkpoint}')
    return args.weights if args.checkpoint is None else args.checkpoint


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = JobParser(prog='test', description=__doc__)
    parser.add_argument(
        'target',
        help='a work dir, a checkpoint iter_N or a Hugging Face folder, or a config',
    )
    parser.add_argument('weights', nargs='?', help="weights in place of the target's own")
    parser.add_argument('--checkpoint', metavar='PATH', help='the same, by name')
    parser.add_argument(
        '--data', metavar='FOLDER', help="token files in place of the config's val_dataloader"
    )
    parser.add_argument(
        '--output',
        metavar='FOLDER',
        help='keep metrics.json, and reports and a line of JSON a sample of tasks',
    )
    parser.add_argument('--json', action='store_true', help='print one line of JSON, no table')
    parser.add_argument(
        '--launcher', choices=LAUNCHERS, default='none', help='who starts processes'
    )
    parser.add_argument('--traceback', action='store_true', help='say where an error came from')
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='a.b=c', help='changes of the config'
    )
    return parser.parse_args(argv)


if __name__ == '__main__':
    sys.exit(main())
