"""What this machine can do: devices, versions, attention backends, rates, known problems."""

import argparse
import datetime
import json
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist

from internlm_mm.doctor.examination import examine, render_examination
from internlm_mm.engine.last_words import JobParser, tell_once
from internlm_mm.parallel.launch import join_process_group
from internlm_mm.utils.device import pick_device
from internlm_mm.utils.launch import LAUNCHERS, NotStarted, read_launch


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of the command."""
    parser = JobParser(
        prog='doctor.py',
        description=__doc__,
        epilog='Exit code 0: nothing known is wrong; 1: there are problems, each with its cure; '
        '2: it could not look. With several processes, torchrun ... --launcher pytorch, the sum '
        'over all of them is measured, too.',
    )
    parser.add_argument('--quick', action='store_true', help='a tenth of a second for each rate')
    parser.add_argument('--no-rates', action='store_true', help='measure nothing')
    parser.add_argument('--json', action='store_true', help='one line of JSON instead of text')
    parser.add_argument('--launcher', choices=LAUNCHERS, default='none')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = parse_args(argv)
    try:
        launch = read_launch(args.launcher)
        device = pick_device(launch.local_rank)
    except ValueError as error:
        told = error.told('tools/doctor.py') if isinstance(error, NotStarted) else error
        tell_once(f'error: {told}')
        return 2
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    join_process_group(args.launcher, launch, device, datetime.timedelta(minutes=5))
    try:
        report = examine(device, 0.0 if args.no_rates else 0.1 if args.quick else 1.0)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if launch.rank == 0:
        print(json.dumps(report) if args.json else render_examination(report))
    return 1 if report['problems'] else 0


if __name__ == '__main__':
    sys.exit(main())
