"""Samples of one and of several turns, side by side."""

import json
from pathlib import Path

import numpy as np
import pytest

from internlm_mm.evaluation import (
    Answerers,
    Generate,
    LogProb,
    LogProbAnswer,
    Outside,
    Play,
    Report,
    Task,
    run_task,
    write_records,
    write_reports,
)
from internlm_mm.evaluation.session import check_names
from internlm_mm.inference import Sampling


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


class Conversations(Task):
    """Sample i asks i times for a text that follows what it was told, then for two scores."""

    name = 'conversations'
    generates = True

    def prepare(self, subject) -> None:
        pass

    def __len__(self) -> int:
        return 4

    def play(self, index: int) -> Play:
        said = str(index)
        for _ in range(index):
            (said,) = yield [Generate(ids(*map(ord, said)), Sampling())]
        scores = yield [LogProb(ids(index), ids(one)) for one in (5, 6)]
        return {'prompt': '', 'prediction': said, 'answer': '', 'right': index > 1,
                'scores': [score.log_prob for score in scores]}  # fmt: skip

    def report(self, records) -> Report:
        return Report({'right': sum(record['right'] for record in records)}, {'a': {'b': 0.5}})


class Model:
    """Notes how many requests came at once; says what it was asked, with a mark."""

    def __init__(self) -> None:
        self.rounds: list[tuple[str, int]] = []

    def log_prob(self, requests) -> list[LogProbAnswer]:
        self.rounds.append(('log_prob', len(requests)))
        return [
            LogProbAnswer(-float(one.prompt[0] * 10 + one.continuation[0]), 1, False)
            for one in requests
        ]

    def generate(self, requests) -> list[str]:
        self.rounds.append(('generate', len(requests)))
        return [''.join(map(chr, one.prompt.tolist())) + '!' for one in requests]


def test_turns_are_answered_together() -> None:
    model = Model()
    records = run_task(Conversations(), Answerers(model.log_prob, model.generate))
    assert [record['prediction'] for record in records] == ['0', '1!', '2!!', '3!!!']
    assert [record['scores'] for record in records] == [
        [-5, -6], [-15, -16], [-25, -26], [-35, -36]
    ]  # fmt: skip
    assert [(record['task'], record['index']) for record in records] == [
        ('conversations', index) for index in range(4)
    ]
    assert model.rounds == [
        ('log_prob', 2), ('generate', 3),
        ('log_prob', 2), ('generate', 2),
        ('log_prob', 2), ('generate', 1),
        ('log_prob', 2),
    ]  # fmt: skip


def test_a_task_that_does_not_say_that_it_writes() -> None:
    with pytest.raises(AssertionError, match='generates = True'):
        run_task(Conversations(), Answerers(Model().log_prob))


class Errands(Conversations):
    """Sample i runs i errands, each of which knows how many samples are at work."""

    name = 'errands'

    def __init__(self, at_once: int | None, fails: bool = False) -> None:
        self.at_once, self.fails = at_once, fails
        self.working: set[int] = set()
        self.finished = 0

    def play(self, index: int) -> Play:
        self.working.add(index)
        seen = []
        for _ in range(index):
            (count,) = yield [Outside(self.errand, index)]
            seen.append(count)
        self.working.discard(index)
        return {'prompt': '', 'prediction': seen, 'answer': '', 'right': True}

    def errand(self) -> int:
        if self.fails:
            raise OSError('broken')
        return len(self.working)

    def finish(self) -> None:
        self.finished += 1


def test_no_more_at_once_than_a_task_can_hold() -> None:
    together, two = Errands(None), Errands(2)
    assert [one['prediction'] for one in run_task(together, Answerers())] == [
        [], [3], [3, 2], [3, 2, 1]
    ]  # fmt: skip
    assert [one['prediction'] for one in run_task(two, Answerers())] == [
        [], [2], [2, 2], [2, 1, 1]
    ]  # fmt: skip
    assert together.finished == two.finished == 1
    failing = Errands(2, fails=True)
    with pytest.raises(RuntimeError, match='OSError: broken'):
        run_task(failing, Answerers())
    assert failing.finished == 1


def test_files(tmp_path: Path) -> None:
    task, model = Conversations(), Model()
    records = run_task(task, Answerers(model.log_prob, model.generate))
    path = write_records(tmp_path / 'new' / 'folder', task, records)
    assert path.name == 'conversations.jsonl'
    assert [json.loads(line) for line in path.read_text().splitlines()] == records
    file = write_reports(path.parent, {task.name: task.report(records)})
    assert json.loads(file.read_text()) == {
        'conversations': {'metrics': {'right': 2}, 'details': {'a': {'b': 0.5}}, 'counts': {}}
    }


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('a/b', r"name='a/b' cannot be the name of a file"),
        ('..', 'cannot be the name of a file'),
        ('', 'cannot be the name of a file'),
        ('loss', 'the name of another metric'),
    ],
)
def test_names_that_cannot_be(name: str, message: str) -> None:
    task = Conversations()
    check_names([task])
    task.name = name
    with pytest.raises(ValueError, match=message):
        check_names([task])
    with pytest.raises(ValueError, match='two are called'):
        check_names([Conversations(), Conversations()])
