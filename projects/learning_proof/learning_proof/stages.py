"""One seed's four runs through the ordinary trainer, and the questions after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internlm_mm.api import train
from internlm_mm.checkpoint.step_folders import list_checkpoints, step_of
from internlm_mm.utils.curves import read_run
from learning_proof.data import TEMPLATE, Amounts, Files, held_out_cases, write_data
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


def run_seed(root: Path, seed: int, plan: Plan, say: Callable[[str], None] = print) -> dict:
    """Make a seed's data, train its four models, ask each the held-out questions.

    Args:
        root: A folder of this seed alone.
        seed: Of the data, the initialisation and the order of the rows.
        plan: What is run.
        say: Told of every score, a line each.

    Returns:
        By stage: its scores, see `examine`, and 'seconds' of training.
    """
    files = write_data(root, plan.amounts, seed)
    cases = held_out_cases(plan.amounts)
    results: dict[str, Any] = {}
    for stage in STAGES:
        work_dir = root / stage.name
        start = time.perf_counter()
        train(
            CONFIGS / f'{stage.name}.py',
            work_dir=work_dir,
            options={**options_of(stage, files, seed), **plan.options},
        )
        seconds = time.perf_counter() - start
        before = results[stage.start]['curve'][-1] if stage.start else None
        results[stage.name] = examine(work_dir, cases, before) | {'seconds': round(seconds, 1)}
        exact, bracketed = (results[stage.name]['curve'][-1][key] for key in ('exact', 'bracketed'))
        say(
            f'seed {seed} | {stage.name:<4} | {seconds:5.0f} s | exact {exact:7.2%} | '
            f'in brackets {bracketed:7.2%}'
        )
    return results


def options_of(stage: Stage, files: Files, seed: int) -> dict[str, Any]:
    """What a stage's config is told of this seed: paths, the vocabulary, the seed."""
    options: dict[str, Any] = {
        'tokenizer.path': str(files.tokenizer),
        'randomness.seed': seed,
        'experiment_name': f'{files.root.resolve()}_{stage.name}'.replace('/', '_'),
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
    return options | {'load_from': str(files.root / stage.start)}


def examine(work_dir: Path, cases: Sequence[Case], before: Mapping[str, Any] | None) -> dict:
    """Ask every checkpoint of a run.

    Args:
        work_dir: Of the run.
        cases: The questions.
        before: The last point of the run that this one began with; becomes step 0.

    Returns:
        'curve': shares by step; 'by_task': right answers of the last checkpoint; 'examples':
        questions with its answers; 'parameters' and 'trained'; and for pairs 'preference', the
        share whose chosen answer has the higher implicit reward, before and after.
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
