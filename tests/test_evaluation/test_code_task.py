"""Functions that are written and tested: by scripted models, in the sandbox."""

import itertools
from pathlib import Path

import pytest

from internlm_mm.evaluation import Answerers, CodeTask, Subject, run_task
from internlm_mm.evaluation.code_task import (
    CodeProblem,
    pass_at_k,
    read_code_problem,
    whole_program,
)
from internlm_mm.evaluation.programs import Programs
from internlm_mm.inference import Written
from tests.questions import write_jsonl
from tests.scripted import records_of
from tests.trained import train_tokenizer

ADD = {
    'task_id': 'Test/0',
    'prompt': 'import math\n\n\ndef add(a: int, b: int) -> int:\n    """Add."""\n',
    'entry_point': 'add',
    'canonical_solution': '    return a + b\n',
    'test': '\n\nMETA = {}\n\n\ndef check(candidate):\n    assert candidate(1, 2) == 3\n',
}
ROOT = {
    'task_id': 'Test/1',
    'prompt': 'import math\n\n\ndef root(x: float) -> float:\n    """Its square root."""\n',
    'entry_point': 'root',
    'canonical_solution': '    return math.sqrt(x)\n',
    'test': 'def check(candidate):\n    assert candidate(9) == 3\n    assert candidate(4) == 2\n',
}


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return train_tokenizer(tmp_path_factory.mktemp('tokenizer'))


@pytest.fixture(scope='module')
def _sandbox() -> None:
    try:
        Programs(None, 1).check()
    except ValueError as error:
        pytest.skip(str(error))


def prepared(folder: Path, tokenizer, rows=(ADD, ROOT), **options) -> CodeTask:
    task = CodeTask(write_jsonl(folder / 'HumanEval.jsonl', list(rows)), **options)
    task.prepare(Subject(tokenizer, 2048))
    return task


@pytest.mark.usefixtures('_sandbox')
def test_right_and_wrong_functions(tokenizer, tmp_path: Path) -> None:
    bodies = {
        'right': (ADD['canonical_solution'], ''),
        'wrong': ('    return a - b\n', 'assertion'),
        'leaves': ('    import os; os._exit(0)\n', 'killed'),
        'exits': ('    return a + b\nraise SystemExit\n', 'raised'),
        'hangs': ('    while True: pass\n', 'timeout'),
        'broken': ('    return a +\n', 'syntax'),
        'own_check': ('    return 0\ndef check(x): pass\n', 'assertion'),
    }
    rows = [{**ADD, 'task_id': word, 'prompt': ADD['prompt'].replace('Add.', word)}
            for word in bodies]  # fmt: skip
    task = prepared(tmp_path, tokenizer, rows, sandbox={'limits': {'seconds': 1.0}})

    def say(prompt: str) -> str:
        return next(body for word, (body, _) in bodies.items() if f'"""{word}"""' in prompt)

    records = records_of(task, say, tokenizer)
    found = {record['subject']: record['outcomes'] for record in records}
    assert found == {word: [error or 'passed'] for word, (_, error) in bodies.items()}
    report = task.report(records)
    assert report.metrics == {'pass_at_1': pytest.approx(1 / 7)}
    assert report.counts['errors/assertion'] == 2 and report.counts['samples'] == 7


@pytest.mark.usefixtures('_sandbox')
def test_several_samples_of_a_problem(tokenizer, tmp_path: Path) -> None:
    task = prepared(tmp_path, tokenizer, samples=4, k=(1, 2, 4), temperature=0.8, seed=5)
    asked = []

    def write(requests):
        asked.extend(requests)
        turns = itertools.count()
        # Of the first problem one of four is right, of the second all are.
        return [
            Written('    return a + b\n' if next(turns) == 2 else '    return a\n')
            if 'add' in tokenizer.decode(request.prompt.tolist())
            else Written(ROOT['canonical_solution'])
            for request in requests
        ]

    records = run_task(task, Answerers(generate=write))
    assert [record['passed'] for record in records] == [1, 4]
    assert task.report(records).metrics == {
        'pass_at_1': pytest.approx((1 / 4 + 1) / 2),
        'pass_at_2': pytest.approx((1 / 2 + 1) / 2),
        'pass_at_4': 1.0,
    }
    assert [one.sampling.seed for one in asked] == [5, 6, 7, 8] * 2
    assert all('\ndef ' in one.sampling.stop for one in asked)


@pytest.mark.slow
@pytest.mark.usefixtures('_sandbox')
def test_in_a_conversation(tokenizer, tmp_path: Path) -> None:
    task = prepared(tmp_path, tokenizer, chat_template='internlm2')
    answers = {
        'add': 'Sure:\n```python\ndef add(a, b):\n    return a + b\n```\nAnd a test:\n'
        '```python\nadd(1, 2)\n```',
        'root': 'def root(x):\n    return math.sqrt(x)\n',  # without a fence or an import
    }
    records = records_of(task, lambda prompt: answers['add' if 'add' in prompt else 'root'],
                         tokenizer)  # fmt: skip
    assert [record['right'] for record in records] == [True, True]
    assert 'Complete this function' in records[0]['prompt']


def problem(**changes) -> CodeProblem:
    return next(read_code_problem({**ADD, **changes}))


def test_programs_in_answers() -> None:
    one = problem()
    assert whole_program('```\n    return a + b\n```', one) == ADD['prompt'] + '    return a + b'
    fenced = '```python\nprint(1)\n```\n```py\ndef add(a, b):\n    return 1\n'
    assert whole_program(fenced, one) == 'import math\n\n\n\ndef add(a, b):\n    return 1'


def test_the_estimate_is_that_of_counting_subsets() -> None:
    for passed in range(6):
        for k in range(1, 6):
            draws = list(itertools.combinations([True] * passed + [False] * (5 - passed), k))
            expected = sum(any(draw) for draw in draws) / len(draws)
            assert pass_at_k(5, passed, k) == pytest.approx(expected)


@pytest.mark.parametrize(
    ('options', 'row', 'words'),
    [
        ({'samples': 0}, {}, 'samples=0 must be at least 1'),
        ({'k': (1, 5), 'samples': 4, 'temperature': 0.8}, {}, 'each from 1 to samples=4'),
        ({'samples': 2}, {}, 'samples=2 with temperature=0 would all be the same'),
        ({}, {'entry_point': 'a b'}, "entry_point 'a b'"),
        ({}, {'test': 'assert add(1, 2) == 3'}, "no 'def check(candidate)'"),
        ({}, {'prompt': None}, "field 'prompt' is null"),
        ({}, {'prompt': 'x = 1\n' * 2000}, 'do not fit into max_seq_len=2048'),
        ({'sandbox': {'backnd': 'auto'}}, {}, "Did you mean 'backend'?"),
    ],
)
def test_what_is_refused(options: dict, row: dict, words: str, tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        prepared(tmp_path, tokenizer, [{**ADD, **row}], **options)
    assert words in str(refused.value)
