"""Prove that fine-tuning teaches: full, by LoRA and by DPO, on held-out questions.

python projects/learning_proof/run.py --seeds 0 1 2 --out work_dirs/learning_proof
"""

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from learning_proof.report import (
    PICTURE,
    RECORD,
    draw,
    fill_page,
    judge,
    split_page,
    table,
    write_record,
)
from learning_proof.stages import QUICK, Plan, run_base, run_seed

from internlm_mm.utils.arguments import Arguments
from internlm_mm.utils.system import builds

PLAN = 'plan.json'


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Arguments(prog='run.py', description=__doc__)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--out', type=Path, default=Path('work_dirs/learning_proof'))
    parser.add_argument(
        '--jobs', type=int, help='seeds at a time, a process each (default: all, on a GPU; 2)'
    )
    parser.add_argument(
        '--report',
        action='store_true',
        help='train nothing: tell once more what was found in --out',
    )
    parser.add_argument(
        '--page', type=Path, help='a page of documentation whose results are written anew'
    )
    parser.add_argument(
        '--quick', action='store_true', help='a few steps of everything; proves nothing'
    )
    args = parser.parse_args(argv)
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f'--seeds {" ".join(map(str, args.seeds))}: one is there twice')
    if args.jobs is not None and args.jobs < 1:
        parser.error(f'--jobs {args.jobs} must be at least 1')
    plan = args.out / PLAN
    asked = QUICK if args.quick else Plan()
    if plan.is_file() and json.loads(plan.read_text(encoding='utf-8')) != asdict(asked):
        parser.error(f'--out {args.out} holds a proof of other amounts: give another folder')
    if args.page is not None:
        try:
            split_page(args.page)
        except (OSError, ValueError) as error:
            parser.error(f'--page: {error}')
    if args.report:
        if not (args.out / RECORD).is_file():
            parser.error(f'--report: there is no {args.out / RECORD}')
    return args


def prove(seeds: Sequence[int], out: Path, jobs: int, plan: Plan) -> dict[str, Any]:
    """Make the base model, then run every seed in a process of its own; the whole record."""
    # Fresh processes: one that has trained has a process group and, on a GPU, a context.
    options = dict(mp_context=get_context('spawn'), max_tasks_per_child=1)
    with ProcessPoolExecutor(jobs, **options) as pool:
        pool.submit(_base, out, plan).result()
        found = {seed: pool.submit(_seed, out, seed, jobs, plan) for seed in seeds}
        results = {str(seed): future.result() for seed, future in found.items()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'
    return {
        'date': datetime.now(UTC).strftime('%Y-%m-%d'),
        'device': device,
        'builds': builds(),
        'seeds': results,
    }


def _base(out: Path, plan: Plan) -> None:
    run_base(out, _spawned(plan))


def _seed(out: Path, seed: int, jobs: int, plan: Plan) -> dict[str, Any]:
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    return run_seed(out, seed, _spawned(plan))


def _spawned(plan: Plan) -> Plan:
    # MMEngine would set another one, and warn of it.
    started = {'env_cfg.mp_cfg.mp_start_method': 'spawn'}
    return replace(plan, options={**plan.options, **started})


def main(argv: list[str] | None = None) -> int:
    """Run the proof: 0 if every seed reaches every target, 1 if not."""
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.report:
        record = json.loads((args.out / RECORD).read_text(encoding='utf-8'))
    else:
        plan = QUICK if args.quick else Plan()
        write_record(args.out / PLAN, asdict(plan))
        jobs = args.jobs or (len(args.seeds) if torch.cuda.is_available() else 2)
        record = prove(args.seeds, args.out, jobs, plan)
        write_record(args.out / RECORD, record)
    seeds = record['seeds']
    missed = judge(seeds)
    text = table(seeds)
    (args.out / 'results.md').write_text(text, encoding='utf-8')
    print(f'\n{text}')
    draw(seeds, args.out / PICTURE)
    if args.page is not None:
        fill_page(args.page, record, args.out / PICTURE)
    for line in missed:
        print(f'missed: {line}')
    print(json.dumps({'device': record['device'], 'missed': missed}))
    return 1 if missed else 0


if __name__ == '__main__':
    sys.exit(main())
