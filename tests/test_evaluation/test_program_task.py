"""Problems that a program answers: written by a scripted model, run in the sandbox."""

from pathlib import Path

import pytest

from internlm_mm.evaluation import ProgramTask, Subject
from internlm_mm.evaluation.program_task import EXAMPLES, run_solution, solution_of
from internlm_mm.evaluation.programs import Programs
from tests.questions import write_jsonl
from tests.scripted import records_of
from tests.trained import train_tokenizer


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return train_tokenizer(tmp_path_factory.mktemp('tokenizer'))


@pytest.fixture(scope='module')
def programs():
    one = Programs({'limits': {'seconds': 1.0}}, sessions=4)
    try:
        one.check()
    except ValueError as error:
        pytest.skip(str(error))
    yield one
    one.close()


def prepared(folder: Path, tokenizer, rows: list[dict], **options) -> ProgramTask:
    task = ProgramTask(write_jsonl(folder / 'test.jsonl', rows), **options)
    task.prepare(Subject(tokenizer, 4096))
    return task


def test_the_examples_in_front_are_right(programs: Programs) -> None:
    assert len(EXAMPLES) == 3
    answers = [run_solution(programs, program).result for _, program in EXAMPLES]
    assert [float(answer) for answer in answers] == [18.5, 290, 81]


@pytest.mark.usefixtures('programs')
@pytest.mark.parametrize('template', [None, pytest.param('internlm2', marks=pytest.mark.slow)])
def test_answers_of_programs(template: str | None, tokenizer, tmp_path: Path) -> None:
    said = {
        'right': ('def solution():\n    print("x")\n    return 6 * 7.0', ''),
        'close': ('def solution():\n    return 0.1 + 0.2 + 41.7', ''),
        'wrong': ('def solution():\n    return 41', ''),
        'raises': ('def solution():\n    return 1 / 0', 'raised'),
        'hangs': ('def solution():\n    while True: pass', 'timeout'),
        'talks': ('I do not know.', 'no_program'),
    }
    rows = [{'question': f'{word}?', 'answer': 'So it is.\n#### 42'} for word in said]
    sandbox = {'limits': {'seconds': 1.0}}
    task = prepared(tmp_path, tokenizer, rows, chat_template=template, sandbox=sandbox)

    def say(prompt: str) -> str:
        text = next(text for word, (text, _) in said.items() if f'{word}?' in prompt)
        return text if template is None else f'Here:\n```python\n{text}\n```'

    records = records_of(task, say, tokenizer)
    assert [record['right'] for record in records] == [True, True, False, False, False, False]
    assert [record['errors'] for record in records] == [
        [error] if error else [] for _, error in said.values()
    ]
    assert [record['prediction'] for record in records][:3] == ['42.0', '42.0', '41']
    report = task.report(records)
    assert report.metrics == {'accuracy': pytest.approx(1 / 3), 'execution': 0.5}
    assert report.counts['errors/timeout'] == 1 and report.counts['errors/no_program'] == 1
    if template is None:
        assert records[0]['prompt'].endswith('Question: right?\n\n```python\n')
        assert records[0]['prompt'].count('def solution():') == 3
    else:
        assert records[0]['prompt'].count('<|im_start|>user') == 4


def test_programs_in_answers() -> None:
    program = 'def solution():\n    return 1'
    assert solution_of(program) == program
    assert solution_of(f'So:\n```\nx = 1\n```\n```python\n{program}\n```\nDone') == program
    assert solution_of(f'```python\nimport math\n{program}') == f'import math\n{program}'
    assert solution_of('```python\nx = 1\n```') is None
    assert solution_of('def other(): pass') is None


def test_what_a_function_returns(programs: Programs) -> None:
    half = 'from fractions import Fraction\ndef solution():\n    return Fraction(1, 2)'
    assert run_solution(programs, half).result == '1/2'
    quoted = 'def solution():\n    return "it\'s \\"5\\"\\n"'
    assert run_solution(programs, quoted).result == 'it\'s "5"\n'
    long = 'def solution():\n    return "9" * 30_000'
    assert run_solution(programs, long).error == 'result'


def test_examples_of_your_own_and_what_is_refused(tokenizer, tmp_path: Path) -> None:
    rows = [{'question': 'x?', 'answer': '#### 1'}]
    own = write_jsonl(tmp_path / 'own.jsonl', [
        {'question': f'q{n}', 'program': f'def solution():\n    return {n}'} for n in range(3)
    ])  # fmt: skip
    task = prepared(tmp_path, tokenizer, rows, examples=own, shots=2)
    assert task.name == 'gsm8k_pal' and task._samples[0].request.sampling.temperature == 0
    drawn = prepared(tmp_path, tokenizer, rows, temperature=1.0, seed=3)
    sampling = drawn._samples[0].request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (1.0, 0.8, 3)
    assert 'return 1' in task._samples[0].prompt and 'return 2' not in task._samples[0].prompt
    bad = write_jsonl(tmp_path / 'bad.jsonl', [{'question': 'q', 'programm': 'x'}])
    for options, words in (
        ({'format': 'gsm8'}, "Did you mean 'gsm8k'?"),
        ({'compare': 'nere'}, "Did you mean 'near'?"),
        ({'shots': 4}, 'shots=4, but there are 3 examples'),
        ({'shots': -1}, 'shots=-1 must be at least 0'),
        ({'max_samples': 0}, 'max_samples=0'),
        ({'examples': bad}, "'program' is missing. Did you mean 'programm'?"),
        ({'max_new_tokens': 4090}, 'do not fit into max_seq_len=4096'),
    ):
        with pytest.raises(ValueError) as refused:
            prepared(tmp_path, tokenizer, rows, **options)
        assert words in str(refused.value)
