"""Prove that fine-tuning teaches: full, by LoRA and by DPO, on held-out questions.

python projects/learning_proof/run.py --seeds 0 1 2 --out work_dirs/learning_proof
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from learning_proof.report import RECORD, draw, judge, table, write_record
from learning_proof.stages import QUICK, Plan, run_seed

from internlm_mm.utils.system import builds


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog='run.py', description=__doc__)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--out', type=Path, default=Path('work_dirs/learning_proof'))
    parser.add_argument(
        '--jobs', type=int, help='seeds at a time, a process each (default: all, on a GPU; 2)'
    )
    parser.add_argument(
        '--report',
        action='store_true',
        help='train nothing: tell once more what the seeds in --out have found',
    )
    parser.add_argument(
        '--quick', action='store_true', help='a few steps of everything; proves nothing'
    )
    args = parser.parse_args(argv)
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f'--seeds {" ".join(map(str, args.seeds))}: one is there twice')
    if args.jobs is not None and args.jobs < 1:
        parser.error(f'--jobs {args.jobs} must be at least 1')
    if args.report:
        if not (args.out / RECORD).is_file():
            parser.error(f'--report: there is no {args.out / RECORD}')
    elif args.out.exists() and any(args.out.iterdir()):
        parser.error(f'--out {args.out} is not empty: give another folder')
    return args


def prove(seeds: Sequence[int], out: Path, jobs: int, plan: Plan) -> dict[str, Any]:
    """Run every seed in a process of its own; the whole record."""
    start = time.perf_counter()
    # Fresh processes: one that has trained has a process group and, on a GPU, a context.
    pool = ProcessPoolExecutor(jobs, mp_context=get_context('spawn'), max_tasks_per_child=1)
    with pool:
        found = {seed: pool.submit(_seed, out / f'seed_{seed}', seed, jobs, plan) for seed in seeds}
        results = {str(seed): future.result() for seed, future in found.items()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'
    return {
        'date': datetime.now(UTC).strftime('%Y-%m-%d'),
        'device': device,
        'builds': builds(),
        'seconds': round(time.perf_counter() - start, 1),
        'seeds': results,
    }


def _seed(root: Path, seed: int, jobs: int, plan: Plan) -> dict[str, Any]:
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    # MMEngine would set another one, and warn of it.
    started = {'env_cfg.mp_cfg.mp_start_method': 'spawn'}
    found = run_seed(root, seed, replace(plan, options={**plan.options, **started}))
    write_record(root / RECORD, found)
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the proof: 0 if every seed reaches every target, 1 if not."""
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.report:
        record = json.loads((args.out / RECORD).read_text(encoding='utf-8'))
    else:
        jobs = args.jobs or (len(args.seeds) if torch.cuda.is_available() else 2)
        record = prove(args.seeds, args.out, jobs, QUICK if args.quick else Plan())
        write_record(args.out / RECORD, record)
    seeds = record['seeds']
    missed = judge(seeds)
    text = f'{table(seeds)}\n{record["seconds"]:.0f} s on {record["device"]}\n'
    (args.out / 'results.md').write_text(text, encoding='utf-8')
    print(f'\n{text}')
    draw(seeds, args.out / 'curves.png')
    for line in missed:
        print(f'missed: {line}')
    print(json.dumps({'seconds': record['seconds'], 'device': record['device'], 'missed': missed}))
    return 1 if missed else 0


if __name__ == '__main__':
    sys.exit(main())
