"""Tasks at work: samples side by side, their requests together, records on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internlm_mm.evaluation.outside import OutsideWorker
from internlm_mm.evaluation.requests import (
    Answer,
    Generate,
    LogProb,
    LogProbAnswer,
    Outside,
    Request,
)
from internlm_mm.evaluation.task import Play, Report, Task

METRICS_FILE = 'tasks.json'
"""Beside the records: metrics, details and counts of every task."""


@dataclass(frozen=True, slots=True)
class Answerers:
    """Who answers which kind of request.

    Attributes:
        log_prob: Answers all `LogProb` of a round; None where no task asks for them.
        generate: Answers all `Generate` of a round; None where no task asks for texts.
        outside: Answers all `Outside` of a round; by default in this process, which has to be
            the only one.
    """

    log_prob: Callable[[Sequence[LogProb]], Sequence[LogProbAnswer]] | None = None
    generate: Callable[[Sequence[Generate]], Sequence[str]] | None = None
    outside: Callable[[Sequence[Outside]], Sequence[Any]] = field(default_factory=OutsideWorker)


def run_task(task: Task, answerers: Answerers) -> list[dict[str, Any]]:
    """Records of all samples, in their order.

    Samples go on in rounds: what all of them ask in one is answered together, so a task of one
    question each takes one round, and a conversation as many as it has turns.

    Args:
        task: Prepared.
        answerers: Collective where the model is: every process runs the same task.
    """
    try:
        records = _play(task, answerers)
    finally:
        task.finish()
    found = []
    for index, record in enumerate(records):
        assert record is not None, 'a play returns its record'
        found.append({'task': task.name, 'index': index, **record})
    return found


def _play(task: Task, answerers: Answerers) -> list[dict[str, Any] | None]:
    records: list[dict[str, Any] | None] = [None] * len(task)
    waiting: dict[int, Sequence[Request]] = {}
    plays: dict[int, Play] = {}
    coming = iter(range(len(task)))
    most = task.at_once or len(task)

    def go_on(index: int, answers: Sequence[Answer] | None) -> None:
        try:
            asked = next(plays[index]) if answers is None else plays[index].send(answers)
        except StopIteration as end:
            records[index] = end.value
            del plays[index]
        else:
            waiting[index] = asked

    while True:
        while len(plays) < most and (index := next(coming, None)) is not None:
            plays[index] = task.play(index)
            go_on(index, None)
        if not waiting:
            return records
        round_ = dict(waiting)
        waiting.clear()
        answers = iter(_answer([one for asked in round_.values() for one in asked], answerers))
        for index, asked in round_.items():
            go_on(index, [next(answers) for _ in asked])


def write_records(folder: Path, task: Task, records: Sequence[Mapping[str, Any]]) -> Path:
    """One line of JSON a sample, in `folder/NAME.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f'{task.name}.jsonl'
    lines = (json.dumps(record, ensure_ascii=False) + '\n' for record in records)
    path.write_text(''.join(lines), encoding='utf-8')
    return path


def write_reports(folder: Path, reports: Mapping[str, Report]) -> Path:
    """Metrics, details and counts of tasks, in `folder/METRICS_FILE`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / METRICS_FILE
    text = json.dumps(
        {
            name: {'metrics': one.metrics, 'details': one.details, 'counts': one.counts}
            for name, one in reports.items()
        },
        indent=2,
        ensure_ascii=False,
    )
    path.write_text(text + '\n', encoding='utf-8')
    return path


def check_names(tasks: Sequence[Task]) -> None:
    """Refuse names that files and metrics cannot have.

    Raises:
        ValueError: If two tasks have one name, or one cannot be a file's.
    """
    names: list[str] = []
    for task in tasks:
        if task.name in names:
            raise ValueError(
                f'val_cfg.tasks: two are called {task.name!r}; give one of them another name='
            )
        if not task.name or task.name.startswith('.') or set(task.name) & set('/\\\0\n'):
            raise ValueError(f'val_cfg.tasks: name={task.name!r} cannot be the name of a file')
        if task.name in ('loss', 'perplexity', 'token_accuracy'):
            raise ValueError(f'val_cfg.tasks: name={task.name!r} is the name of another metric')
        names.append(task.name)


def _answer(requests: Sequence[Request], answerers: Answerers) -> list[Answer]:
    answers: list[Answer | None] = [None] * len(requests)
    for kind, answerer in (
        (LogProb, answerers.log_prob),
        (Generate, answerers.generate),
        (Outside, answerers.outside),
    ):
        indices = [index for index, one in enumerate(requests) if isinstance(one, kind)]
        if indices:
            assert answerer is not None, (
                f'nobody answers {kind.__name__}; a task that asks for texts says generates = True'
            )
            asked: list[Any] = [requests[index] for index in indices]
            for index, answer in zip(indices, answerer(asked), strict=True):
                answers[index] = answer
    assert all(isinstance(one, Request) for one in requests), 'a request of no known kind'
    return answers
