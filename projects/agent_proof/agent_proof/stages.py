"""A seed: its data, its run, and the questions that every checkpoint of it is asked."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from agent_proof.data import TEMPLATE, Amounts, Files, write_data
from agent_proof.report import RECORD, last, write_record
from agent_proof.scoring import examine
from internlm_mm.api import train
from internlm_mm.checkpoint.step_folders import list_checkpoints, step_of
from internlm_mm.utils.curves import read_run
from internlm_mm.utils.system import builds

CONFIG = Path(__file__).resolve().parents[1] / 'configs' / 'agent.py'
TRAINED = 'trained.json'
LOSSES = 100
"""Points of the curve of the loss that are kept."""


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        amounts: Of data.
        options: Changes to the config, by dotted key.
    """

    amounts: Amounts = field(default_factory=Amounts)
    options: Mapping[str, Any] = field(default_factory=dict)


QUICK = Plan(
    Amounts(cases=12, held_out=2, unseen=2, on_the_way=1),
    {
        'model.hidden_size': 32,
        'model.intermediate_size': 64,
        'model.num_layers': 1,
        'model.num_heads': 2,
        'train_cfg.max_iters': 3,
        'train_cfg.global_batch_size': 4,
        'train_cfg.micro_batch_size': 4,
        'default_hooks.checkpoint.interval': 2,
        'default_hooks.progress.interval': 1,
    },
)
"""A few steps of everything: shows that the parts fit, and proves nothing."""


def train_seed(out: Path, seed: int, plan: Plan, spawned: Mapping[str, Any]) -> Path:
    """Make a seed's data and train on it; what an earlier call has finished is not done again.

    Args:
        out: Where everything is made; the seed's part is `seed_N`.
        seed: Of the data, the first weights and the order of the rows.
        plan: What is run.
        spawned: Options of the process that it runs in.

    Returns:
        The work dir.
    """
    files = Files(out, seed)
    work_dir = files.folder / 'agent'
    if (work_dir / TRAINED).exists():
        return work_dir
    if not files.done.exists():
        write_data(files, plan.amounts)
    if work_dir.exists():  # a run that was broken off
        shutil.rmtree(work_dir)
    start = time.perf_counter()
    options = {**options_of(files), **plan.options, **spawned}
    train(CONFIG, work_dir=work_dir, options=options)
    seconds = round(time.perf_counter() - start, 1)
    made = {'seconds': seconds, 'device': device_name(), 'builds': builds()}
    write_record(work_dir / TRAINED, {**made, 'loss': losses(work_dir)})
    return work_dir


def score_seed(
    out: Path, seed: int, plan: Plan, backend: str, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Ask every checkpoint of a seed; what an earlier call has finished is read.

    Args:
        out: As of `train_seed`, which has been called.
        seed: Whose.
        plan: What is run.
        backend: Of the sandbox.
        say: Told of the last point, in a line.

    Returns:
        'curve': shares by step; 'by_group': right answers of the last checkpoint by kind of
        question; 'examples': conversations with it; 'loss', 'seconds', 'device' and 'builds' of
        training.
    """
    files = Files(out, seed)
    record = files.folder / RECORD
    if not record.exists():
        if not files.done.exists():  # the run was brought from elsewhere
            write_data(files, plan.amounts)
        work_dir = files.folder / 'agent'
        paths = list_checkpoints(work_dir)
        curve, results = [], {}
        for path in paths:
            few = None if path == paths[-1] else plan.amounts.on_the_way
            found = examine(path, files, plan.amounts, backend, few)
            curve.append({'step': step_of(path), **found.pop('shares')})
            results = found
        trained = json.loads((work_dir / TRAINED).read_text(encoding='utf-8'))
        write_record(record, {'curve': curve, **results, **trained})
    found = json.loads(record.read_text(encoding='utf-8'))
    point = last(found)
    say(
        f'seed {seed} | {found["seconds"]:5.0f} s | valid call {point["valid_call"]:7.2%} | '
        f'right {point["right"]:7.2%} | no call {point["not_called"]:7.2%} | '
        f'unseen tools {point["unseen_schema_valid"]:7.2%} | '
        f'without tools {point["without_tools"]:7.2%}'
    )
    return found


def device_name() -> str:
    """What this process computes on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'


def options_of(files: Files) -> dict[str, Any]:
    """What the config is told: paths and the seed."""
    return {
        'tokenizer.path': str(files.tokenizer),
        'randomness.seed': files.seed,
        'experiment_name': f'{files.folder.resolve()}_agent'.replace('/', '_'),
        'log_level': 'WARNING',
        'train_dataloader.dataset.path': str(files.chat / 'train'),
        'train_dataloader.dataset.cache_dir': str(files.cache),
        'train_dataloader.dataset.chat_template': TEMPLATE,
    }


def losses(work_dir: Path) -> list[tuple[int, float]]:
    """Steps and losses of a run, thinned out."""
    series = read_run(work_dir).series('loss')
    every = max(1, len(series) // LOSSES)
    return sorted(series.items())[every - 1 :: every]
