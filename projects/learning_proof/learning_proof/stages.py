"""The base model, and the runs of a seed that begin with it; questions are asked after each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internlm_mm.api import train
from internlm_mm.checkpoint.step_folders import list_checkpoints, step_of
from internlm_mm.utils.curves import read_run
from learning_proof.data import (
    BASE_SEED,
    TEMPLATE,
    Amounts,
    Files,
    held_out_cases,
    write_base_data,
    write_seed_data,
)
from learning_proof.report import RECORD, write_record
from learning_proof.scoring import Score, ask, score
from learning_proof.tasks import TASKS, Case

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
NUM_EXAMPLES = 8


@dataclass(frozen=True)
class Stage:
    """One run.

    Attributes:
        name: Of its config and of its folder.
        start: The stage whose weights it begins with.
        data: Which of a seed's data it reads, an attribute of `Files`.
    """

    name: str
    start: str | None
    data: str


STAGES = (
    Stage('base', None, 'tokens'),
    Stage('sft', 'base', 'chat'),
    Stage('lora', 'base', 'chat'),
    Stage('dpo', 'sft', 'preferences'),
)


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        amounts: Of data.
        options: Changes to the configs of all stages, by dotted key.
    """

    amounts: Amounts = field(default_factory=Amounts)
    options: Mapping[str, Any] = field(default_factory=dict)


QUICK = Plan(
    Amounts(texts=200, cases=80, pairs=40, held_out=10),
    {
        'model.hidden_size': 32,
        'model.intermediate_size': 64,
        'model.num_layers': 1,
        'train_cfg.max_iters': 3,
        'train_cfg.global_batch_size': 4,
        'train_cfg.micro_batch_size': 4,
        'default_hooks.checkpoint.interval': 2,
    },
)
"""A few steps of everything: shows that the parts fit, and proves nothing."""


def run_base(out: Path, plan: Plan, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Make the base model and ask it the held-out questions.

    Args:
        out: Where everything is made: data in `data`, the run in `base`.
        plan: What is run.
        say: Told of the score, in a line.

    Returns:
        See `examine`. What an earlier call has finished is read and not done again.
    """
    files = files_of(out, BASE_SEED)
    if not (out / 'base' / RECORD).exists():
        if not files.tokens.exists():
            write_base_data(files, plan.amounts)
        run_stage(STAGES[0], out, BASE_SEED, files, plan, None)
    result = _read(out / 'base')
    say(_line('all seeds', 'base', result))
    return result


def run_seed(
    out: Path, seed: int, plan: Plan, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Make a seed's data, fine-tune the base model three times, ask after each.

    Args:
        out: As of `run_base`, which has been called; the seed's part is `seed_N`.
        seed: Of the data, the adapters and the order of the rows.
        plan: What is run.
        say: Told of every score, a line each.

    Returns:
        By stage, the base model's included: see `examine`. What an earlier call has finished is
        read and not done again.
    """
    files = files_of(out, seed)
    if not files.preferences.exists():
        write_seed_data(files, plan.amounts, seed)
    results = {'base': _read(out / 'base')}
    for stage in STAGES[1:]:
        work_dir = files.seed / stage.name
        if not (work_dir / RECORD).exists():
            assert stage.start is not None
            before = results[stage.start]['curve'][-1]
            run_stage(stage, files.seed, seed, files, plan, before)
        results[stage.name] = _read(work_dir)
        say(_line(f'seed {seed}', stage.name, results[stage.name]))
    return results


def run_stage(
    stage: Stage,
    root: Path,
    seed: int,
    files: Files,
    plan: Plan,
    before: Mapping[str, Any] | None,
) -> None:
    """Train and examine; leaves `RECORD` in the work dir."""
    work_dir = root / stage.name
    start = time.perf_counter()
    train(
        CONFIGS / f'{stage.name}.py',
        work_dir=work_dir,
        options={**options_of(stage, files, seed), **plan.options},
    )
    seconds = time.perf_counter() - start
    result = examine(work_dir, held_out_cases(plan.amounts), before)
    write_record(work_dir / RECORD, result | {'seconds': round(seconds, 1)})


def files_of(out: Path, seed: int) -> Files:
    """Where the data of a proof lie."""
    return Files(out / 'data', out / f'seed_{seed}')


def options_of(stage: Stage, files: Files, seed: int) -> dict[str, Any]:
    """What a stage's config is told: paths and the seed."""
    options: dict[str, Any] = {
        'tokenizer.path': str(files.tokenizer),
        'randomness.seed': seed,
        'experiment_name': f'{files.seed.resolve()}_{stage.name}'.replace('/', '_'),
        'log_level': 'WARNING',
    }
    if stage.start is None:
        return options | {'train_dataloader.dataset.data_root': str(files.tokens / 'train')}
    data = getattr(files, stage.data)
    for loader, split in (('train_dataloader', 'train'), ('val_dataloader', 'held_out')):
        options |= {
            f'{loader}.dataset.path': str(data / split),
            f'{loader}.dataset.cache_dir': str(files.cache),
            f'{loader}.dataset.chat_template': TEMPLATE,
        }
    start = files.base.parent / 'base' if stage.start == 'base' else files.seed / stage.start
    return options | {'load_from': str(start)}


def examine(work_dir: Path, cases: Sequence[Case], before: Mapping[str, Any] | None) -> dict:
    """Ask every checkpoint of a run.

    Args:
        work_dir: Of the run.
        cases: The questions.
        before: The last point of the run that this one began with; becomes step 0.

    Returns:
        'curve': shares by step; 'by_task': those of the last checkpoint; 'examples': questions
        with its answers; and for pairs 'preference', the share whose chosen answer has the higher
        implicit reward, before and after.
    """
    curve = [] if before is None else [{**before, 'step': 0}]
    answers: list[str] = []
    for path in list_checkpoints(work_dir):
        answers = ask(path, cases, TEMPLATE)
        curve.append({'step': step_of(path), **shares(score(cases, answers))})
    by_task = {}
    for task in TASKS:
        both = [(c, a) for c, a in zip(cases, answers, strict=True) if c.task == task]
        by_task[task] = shares(score(*zip(*both, strict=True)))
    every = max(1, len(cases) // NUM_EXAMPLES)
    result: dict[str, Any] = {
        'curve': curve,
        'by_task': by_task,
        'examples': [
            {'question': case.question, 'right': case.answer, 'answer': answer}
            for case, answer in list(zip(cases, answers, strict=True))[::every]
        ],
    }
    run = read_run(work_dir)
    if 'val/rewards/accuracy' in run.keys():
        series = run.series('val/rewards/accuracy')
        result['preference'] = {'before': series[min(series)], 'after': series[max(series)]}
    return result


def shares(counts: Score) -> dict[str, Any]:
    """A score as shares of the cases."""
    return {
        'cases': counts.cases,
        'exact': counts.exact / counts.cases,
        'bracketed': counts.bracketed / counts.cases,
    }


def _read(work_dir: Path) -> dict[str, Any]:
    return json.loads((work_dir / RECORD).read_text(encoding='utf-8'))


def _line(seed: str, name: str, result: Mapping[str, Any]) -> str:
    last = result['curve'][-1]
    return (
        f'{seed:<9} | {name:<4} | {result["seconds"]:5.0f} s | exact {last["exact"]:7.2%} | '
        f'in brackets {last["bracketed"]:7.2%}'
    )
