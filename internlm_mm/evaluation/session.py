"""Tasks at work: samples side by side, their requests together, records on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm_mm.evaluation.requests import Answer, Generate, LogProb, LogProbAnswer, Request
from internlm_mm.evaluation.task import Report, Task

METRICS_FILE = 'tasks.json'
"""Beside the records: metrics, details and counts of every task."""


@dataclass(frozen=True, slots=True)
class Answerers:
    """Who answers which kind of request.

    Attributes:
        log_prob: Answers all `LogProb` of a round.
        generate: Answers all `Generate` of a round; None where no task asks for texts.
    """

    log_prob: Callable[[Sequence[LogProb]], Sequence[LogProbAnswer]]
    generate: Callable[[Sequence[Generate]], Sequence[str]] | None = None


def run_task(task: Task, answerers: Answerers) -> list[dict[str, Any]]:
    """Records of all samples, in their order.

    Samples go on in rounds: what all of them ask in one is answered together, so a task of one
    question each takes one round, and a conversation as many as it has turns.

    Args:
        task: Prepared.
        answerers: Collective where the model is: every process runs the same task.
    """
    plays = [task.play(index) for index in range(len(task))]
    records: list[dict[str, Any] | None] = [None] * len(plays)
    waiting: dict[int, Sequence[Request]] = {}

    def go_on(index: int, answers: Sequence[Answer] | None) -> None:
        try:
            asked = next(plays[index]) if answers is None else plays[index].send(answers)
        except StopIteration as end:
            records[index] = end.value
        else:
            waiting[index] = asked

    for index in range(len(plays)):
        go_on(index, None)
    while waiting:
        round_ = dict(waiting)
        waiting.clear()
        answers = iter(_answer([one for asked in round_.values() for one in asked], answerers))
        for index, asked in round_.items():
            go_on(index, [next(answers) for _ in asked])
    found = []
    for index, record in enumerate(records):
        assert record is not None, 'a play returns its record'
        found.append({'task': task.name, 'index': index, **record})
    return found


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
    scored = [index for index, one in enumerate(requests) if isinstance(one, LogProb)]
    written = [index for index, one in enumerate(requests) if isinstance(one, Generate)]
    if scored:
        asked = [one for one in requests if isinstance(one, LogProb)]
        for index, answer in zip(scored, answerers.log_prob(asked), strict=True):
            answers[index] = answer
    if written:
        assert answerers.generate is not None, 'a task that asks for texts says generates = True'
        texts = answerers.generate([one for one in requests if isinstance(one, Generate)])
        for index, text in zip(written, texts, strict=True):
            answers[index] = text
    assert all(answer is not None for answer in answers), 'a request of no known kind'
    return [answer for answer in answers if answer is not None]
