"""Prove that a tiny model learns to call tools: on held-out questions, with tools it never saw.

python projects/agent_proof/run.py --seeds 0 1 2 --out work_dirs/agent_proof
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from agent_proof.report import RECORD, draw, judge, page, table, write_record
from agent_proof.stages import QUICK, Plan, device_name, score_seed, train_seed

from internlm_mm.sandbox import Sandbox, SandboxError

PLAN = 'plan.json'
PICTURE = 'Held-out questions over the steps, and the loss'
BEGIN, END = '<!-- results -->', '<!-- end of results -->'


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog='run.py', description=__doc__)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--out', type=Path, default=Path('work_dirs/agent_proof'))
    parser.add_argument(
        '--jobs', type=int, help='seeds at a time, a process each (default: all, on a GPU; 2)'
    )
    parser.add_argument('--steps', type=int, help='others than those of the config')
    parser.add_argument('--rows', type=int, help='of a step, others than those of the config')
    parser.add_argument(
        '--backend',
        default='auto',
        help="of the sandbox; 'plain' is none, on a machine of no worth",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument('--train-only', action='store_true', help='ask nothing yet')
    only.add_argument(
        '--report',
        action='store_true',
        help='train nothing: tell once more what was found in --out',
    )
    parser.add_argument('--page', type=Path, help='a page in which the results are renewed')
    parser.add_argument(
        '--quick', action='store_true', help='a few steps of everything; proves nothing'
    )
    args = parser.parse_args(argv)
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f'--seeds {" ".join(map(str, args.seeds))}: one is there twice')
    for key in ('jobs', 'steps', 'rows'):
        if (value := getattr(args, key)) is not None and value < 1:
            parser.error(f'--{key} {value} must be at least 1')
    if args.page is not None:
        try:  # before time is spent
            page(args.page.read_text(encoding='utf-8'), '', BEGIN, END)
        except (OSError, ValueError) as error:
            parser.error(f'--page {args.page}: {error}')
    args.plan = plan_of(args)
    stored = args.out / PLAN
    if args.report:
        if not (args.out / RECORD).is_file():
            parser.error(f'--report: there is no {args.out / RECORD}')
    elif stored.is_file() and json.loads(stored.read_text(encoding='utf-8')) != asdict(args.plan):
        parser.error(f'--out {args.out} holds a proof of other amounts: give another folder')
    return args


def plan_of(args: argparse.Namespace) -> Plan:
    """What is to be run."""
    plan = QUICK if args.quick else Plan()
    options = dict(plan.options)
    if args.steps is not None:
        options['train_cfg.max_iters'] = args.steps
    if args.rows is not None:
        options |= {
            'train_cfg.global_batch_size': args.rows,
            'train_cfg.micro_batch_size': args.rows,
        }
    return replace(plan, options=options)


def prove(args: argparse.Namespace, jobs: int) -> dict[str, Any] | None:
    """Run every seed in a process of its own; the whole record."""
    # Fresh processes: one that has trained has a process group and, on a GPU, a context.
    options = dict(mp_context=get_context('spawn'), max_tasks_per_child=1)
    with ProcessPoolExecutor(jobs, **options) as pool:
        trained = [pool.submit(_train, args.out, seed, args.plan, jobs) for seed in args.seeds]
        for future in trained:
            future.result()
        if args.train_only:
            return None
        asked = {
            seed: pool.submit(_score, args.out, seed, args.plan, args.backend, jobs)
            for seed in args.seeds
        }
        results = {str(seed): future.result() for seed, future in asked.items()}
    date = datetime.now(UTC).strftime('%Y-%m-%d')
    return {'date': date, 'device': device_name(), 'seeds': results}


def _train(out: Path, seed: int, plan: Plan, jobs: int) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    # MMEngine would set another one, and warn of it.
    train_seed(out, seed, plan, {'env_cfg.mp_cfg.mp_start_method': 'spawn'})


def _score(out: Path, seed: int, plan: Plan, backend: str, jobs: int) -> dict[str, Any]:
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    return score_seed(out, seed, plan, backend)


def main(argv: list[str] | None = None) -> int:
    """Run the proof: 0 if every seed reaches every target, 1 if not, 2 without a sandbox."""
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.report:
        record = json.loads((args.out / RECORD).read_text(encoding='utf-8'))
    else:
        backend = args.backend
        if not args.train_only:
            try:  # before time is spent
                with Sandbox(args.backend, unsafe=args.backend == 'plain', spare=0) as sandbox:
                    backend = sandbox.backend
            except (SandboxError, ValueError) as error:
                print(f'error: {error}', file=sys.stderr)
                return 2
        write_record(args.out / PLAN, asdict(args.plan))
        jobs = args.jobs or (len(args.seeds) if torch.cuda.is_available() else 2)
        found = prove(args, jobs)
        if found is None:
            return 0
        record = {**found, 'sandbox': backend}
        write_record(args.out / RECORD, record)
    return tell(record, args.out, args.page)


def made_on(results: Mapping[str, Any]) -> str:
    """What a seed was trained on."""
    versions = ', '.join(f'{name} {version}' for name, version in results['builds'].items())
    return f'{results["device"]} ({versions})'


def tell(record: dict[str, Any], out: Path, renewed: Path | None) -> int:
    """Table, picture and verdict."""
    seeds = record['seeds']
    missed = judge(seeds)
    trained = sorted({made_on(results) for results in seeds.values()})
    lines = [f'- Missed: {line}.\n' for line in missed] or ['Every seed reaches every target.\n']
    asked = f'asked on {record["device"]} (sandbox: {record["sandbox"]})'
    head = f'{record["date"]}, trained on {", ".join(trained)}, {asked}:'
    text = f'{head}\n\n{table(seeds)}\n{"".join(lines)}'
    (out / 'results.md').write_text(text, encoding='utf-8')
    print(f'\n{text}')
    draw(seeds, out / 'curves.png')
    if renewed is not None:
        old = renewed.read_text(encoding='utf-8')
        shown = f'![{PICTURE}](assets/{renewed.stem}.png)'
        renewed.write_text(page(old, f'\n{text}\n{shown}\n\n', BEGIN, END), encoding='utf-8')
        picture = renewed.parent / 'assets' / f'{renewed.stem}.png'
        picture.parent.mkdir(exist_ok=True)
        picture.write_bytes((out / 'curves.png').read_bytes())
    print(json.dumps({'device': record['device'], 'missed': missed}))
    return 1 if missed else 0


if __name__ == '__main__':
    sys.exit(main())
