"""The tasks of `val_cfg`: built for a run, answered by its model, recorded in its work dir."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from internlm_mm.evaluation import (
    Answerers,
    LogProbScorer,
    OutsideWorker,
    Report,
    Subject,
    Task,
    TextWriter,
    run_task,
    write_records,
    write_reports,
)
from internlm_mm.evaluation.session import check_names
from internlm_mm.inference import Generator
from internlm_mm.parallel.whole import copy_whole
from internlm_mm.registry import MODELS, TASKS

RECORDS_FOLDER = 'evaluation'
"""Sub-folder of a work dir: a folder for each step with a file of records for each task."""


def check_evaluation(
    val_dataloader: Any, val_cfg: Mapping[str, Any] | None, layout: Any = None
) -> None:
    """Refuse an evaluation that has nothing to read, or more than a layout can do.

    Args:
        val_dataloader: The config's.
        val_cfg: The config's.
        layout: Of the job, where it is known.

    Raises:
        ValueError: Naming the keys.
    """
    tasks = (val_cfg or {}).get('tasks')
    if (val_dataloader is None) != (val_cfg is None) and not tasks:
        raise ValueError(
            'val_dataloader and val_cfg go together: one of them is missing '
            '(val_cfg may do without if it has tasks)'
        )
    if layout is not None and layout.pipeline > 1:
        for index, task in enumerate(tasks or ()):
            kind = task if isinstance(task, Task) else TASKS.get(_name_of(task['type']))
            if getattr(kind, 'generates', False):
                raise ValueError(
                    f'val_cfg.tasks.{index} writes texts, for which every process needs the whole '
                    f'model: not with strategy.parallel.pipeline={layout.pipeline}. Take it out, '
                    'and run it on checkpoints: tools/test.py takes another layout'
                )


def build_tasks(tasks: Sequence[Any], tokenizer: Any, max_seq_len: int) -> list[Task]:
    """Build and prepare tasks: their data are read here, before the model is placed.

    Args:
        tasks: Configs of TASKS members, or built ones.
        tokenizer: Of the model.
        max_seq_len: Tokens that it reads at most.

    Raises:
        FileNotFoundError: If there are no data.
        ValueError: If a task is none or a row is malformed; names task, file, line and field.
    """
    if tokenizer is None:
        raise ValueError(
            'val_cfg.tasks need a tokenizer: tokenizer=dict(type=..., path=...) in the config'
        )
    built = []
    for index, task in enumerate(tasks):
        try:
            one = task if isinstance(task, Task) else TASKS.build(dict(task))
            one.prepare(Subject(tokenizer, max_seq_len))
        except FileNotFoundError as error:
            raise FileNotFoundError(f'val_cfg.tasks.{index}: {error}') from error
        except ValueError as error:
            raise ValueError(f'val_cfg.tasks.{index}: {error}') from error
        built.append(one)
    check_names(built)
    return built


class TaskEvaluation:
    """Runs tasks on the model of a run, whatever its layout.

    Args:
        runner: Gives strategy, tokenizer and config; its model is built and not yet placed.
        tasks: As in `build_tasks`.
        batch_size: Rows of one forward, and prompts that are continued at once, on one rank.

    Raises:
        ValueError: As `build_tasks`, and if the layout cannot do what a task needs.
    """

    def __init__(self, runner: Any, tasks: Sequence[Any], batch_size: int) -> None:
        check_evaluation({}, {'tasks': tasks}, runner.strategy.layout)
        strategy, layout = runner.strategy, runner.strategy.layout
        if not hasattr(runner.model, 'max_seq_len'):
            raise ValueError(
                f'val_cfg.tasks: {type(runner.model).__name__} has no `max_seq_len`, which says '
                'how long prompts may be'
            )
        self.runner, self.batch_size = runner, batch_size
        ring = strategy.techniques.context_attention == 'ring' and layout.context > 1
        self.scorer = LogProbScorer(
            strategy.evaluate,
            max_seq_len=runner.model.max_seq_len,
            batch_size=batch_size,
            data_rank=strategy.data_rank,
            data_world_size=strategy.data_world_size,
            multiple=layout.tensor * (2 * layout.context if layout.context > 1 else 1),
            one_each=ring,
        )
        self.tasks = build_tasks(tasks, runner.tokenizer, self.scorer.longest)
        check_objective(self.tasks, runner.model, strategy.techniques.kernels.cross_entropy)
        writing = [task.name for task in self.tasks if task.generates]
        if writing and not hasattr(runner.model, 'make_cache'):
            raise ValueError(
                f'val_cfg.tasks: {", ".join(writing)} writes texts, for which '
                f'{type(runner.model).__name__} has no `make_cache`: see internlm_mm.models.Decoder'
            )
        self.reports: dict[str, Report] = {}

    def run(self, folder: Path) -> dict[str, float]:
        """Run every task. Collective.

        Args:
            folder: Where the first process writes records and reports.

        Returns:
            'NAME/METRIC' of every task.
        """
        metrics: dict[str, float] = {}
        outside = OutsideWorker(self.runner.rank, self.runner.world_size)
        with self._writer() as write:
            for task in self.tasks:
                records = run_task(task, Answerers(self.scorer, write, outside))
                report = self.reports[task.name] = task.report(records)
                metrics |= {f'{task.name}/{key}': value for key, value in report.metrics.items()}
                if self.runner.rank == 0:
                    write_records(folder, task, records)
        if self.runner.rank == 0:
            write_reports(folder, self.reports)
        return metrics

    @contextmanager
    def _writer(self) -> Iterator[Callable[[Sequence[Any]], list[str]] | None]:
        """Who writes texts; its copy of the model lives as long as it is needed."""
        if not any(task.generates for task in self.tasks):
            yield None
            return
        runner = self.runner
        yield TextWriter(
            Generator(self._whole_model(), runner.tokenizer),
            batch_size=self.batch_size,
            rank=runner.rank,
            world_size=runner.world_size,
        )

    def _whole_model(self) -> nn.Module:
        """The model itself where it is plain, else a copy in the dtype that layers compute in."""
        strategy = self.runner.strategy
        techniques = strategy.techniques
        if strategy.mesh is None and not techniques.compile and not techniques.recompute:
            return strategy.model
        said = {key: value for key, value in self.runner.cfg.model.items() if key != 'objective'}
        with torch.device('meta'):
            model = MODELS.build(said)
        return copy_whole(strategy.model, model, strategy.device, strategy.param_dtype)


def check_objective(tasks: Sequence[Task], model: nn.Module, cross_entropy: str) -> None:
    """Refuse to compare log-probabilities, or to write, by a model that learns something else.

    Args:
        tasks: Built.
        model: May be on the meta device.
        cross_entropy: Name of the kernel.

    Raises:
        ValueError: Naming the tasks, and what hinders them.
    """
    objective = getattr(model, 'objective', None)
    if tasks and getattr(objective, 'replaces_head', False):
        raise ValueError(
            f'val_cfg.tasks: {", ".join(task.name for task in tasks)} needs a model of language, '
            f'and one with the objective {type(objective).__name__} has a score in place of its '
            'head: take it out'
        )
    scored = [task.name for task in tasks if not task.generates]
    if scored and cross_entropy == 'liger':
        raise ValueError(
            f'val_cfg.tasks: {", ".join(scored)} compares log-probabilities, and '
            "strategy.kernels.cross_entropy='liger' tells no losses of single tokens: use 'torch'"
        )
    if scored and not hasattr(objective, 'greedy_tokens'):
        raise ValueError(
            f'val_cfg.tasks: {", ".join(scored)} compares log-probabilities, which the objective '
            f'{type(objective).__name__} does not sum: run it on checkpoints with tools/test.py, '
            'which takes NextToken'
        )


def _name_of(kind: Any) -> Any:
    return kind if isinstance(kind, str) else getattr(kind, '__name__', str(kind))
