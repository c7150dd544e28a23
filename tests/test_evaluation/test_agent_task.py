"""Agents that are scored: a scripted model with real tools, a learned one with a real sandbox."""

import json
from pathlib import Path

import pytest

from internlm_mm.agents import tool
from internlm_mm.engine.evaluate import evaluate
from internlm_mm.evaluation import AgentTask, Subject
from internlm_mm.evaluation.agent_tools import PYTHON
from internlm_mm.sandbox import Sandbox, SandboxError
from internlm_mm.tokenizers import build_template
from tests.chatting import learn_chat
from tests.conversations import call, internlm_model
from tests.questions import write_jsonl
from tests.scripted import records_of


def double(n: int) -> int:
    """Double it."""
    if n > 99:
        raise OverflowError('too large')
    return 2 * n


CALL = '<|action_start|><|plugin|>\n{"name": "%s", "parameters": %s}<|action_end|>'
CODE = '<|action_start|><|interpreter|>\n```python\n%s\n```<|action_end|>'


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return internlm_model(tmp_path_factory.mktemp('tokenizer') / 'model')


def prepared(rows: list[dict], folder: Path, tokenizer, longest: int = 4096, **options):
    path = write_jsonl(folder / 'rows.jsonl', rows)
    options = {'tools': [double], 'interpreter': False, **options}
    task = AgentTask(path, 'internlm2', **options)
    task.prepare(Subject(tokenizer, longest))
    return task


def test_one_that_calls_and_answers_is_right(tokenizer, tmp_path: Path) -> None:
    rows = [
        {'question': 'Twice 4?', 'answer': 8, 'subject': 'double'},
        {'question': 'Hi!', 'answer': 'Hello', 'needs_tool': False, 'subject': 'talk'},
        {'question': 'Twice 5?', 'answer': '10', 'subject': 'double'},
        {'question': 'Bye!', 'answer': 'Goodbye', 'needs_tool': False, 'subject': 'talk'},
    ]

    def say(prompt: str) -> str:
        if 'Twice 4?' in prompt:
            return (
                'It is 8.' if 'environment' in prompt else 'I ask.' + CALL % ('double', '{"n": 4}')
            )
        if 'Twice 5?' in prompt:
            return 'It is 11.'
        if 'Bye' in prompt:
            return 'Good-bye.' if 'environment' in prompt else CALL % ('double', '{"n": 1}')
        return 'hello, you!'

    task = prepared(rows, tmp_path, tokenizer, at_once=2)
    records = records_of(task, say, tokenizer)
    assert [record['right'] for record in records] == [True, True, False, False]
    assert [record['turns'] for record in records] == [2, 1, 1, 2]
    assert records[0]['messages'][2]['content'] == '8'
    assert [one['role'] for one in records[0]['messages']] == [
        'user',
        'assistant',
        'tool',
        'assistant',
    ]
    report = task.report(records)
    assert report.metrics == {
        'accuracy': 0.5, 'answered': 1.0, 'turns': 1.5, 'valid_call': 0.5, 'schema_valid': 0.5,
        'execution': 0.5, 'called_when_not_needed': 0.5,
    }  # fmt: skip
    assert report.details == {'accuracy': {'double': 0.5, 'talk': 0.5}}
    assert report.counts == {'samples': 4, 'skipped': 0}


def test_what_goes_wrong_is_counted_by_class(tokenizer, tmp_path: Path) -> None:
    said = {
        'json': CALL % ('double', '{"n": 4'),
        'unknown': CALL % ('dubble', '{"n": 4}'),
        'schema': CALL % ('double', '{"n": "four"}'),
        'raised': CALL % ('double', '{"n": 100}'),
        'endless': 'It is 8. It is 8. It is ...',
        'never': CALL % ('double', '{"n": 4}'),
    }
    rows = [{'question': f'{word}?', 'answer': '8'} for word in said]

    def say(prompt: str) -> str:
        word = next(word for word in said if f'{word}?' in prompt)
        if word in ('unknown', 'schema', 'raised') and 'environment' in prompt:
            return 'It is 8.'
        return said[word]

    task = prepared(rows, tmp_path, tokenizer, max_turns=4, max_repairs=1)
    records = records_of(task, say, tokenizer)
    by_word = dict(zip(said, records, strict=True))
    assert {word: one['status'] for word, one in by_word.items()} == {
        'json': 'gave_up', 'unknown': 'answer', 'schema': 'answer', 'raised': 'answer',
        'endless': 'not_ended', 'never': 'turn_limit',
    }  # fmt: skip
    assert [one['right'] for one in records] == [False, True, True, True, False, False]
    kinds = ('attempted', 'valid_call', 'schema_valid', 'execution')
    assert {word: [one[kind] for kind in kinds] for word, one in by_word.items()} == {
        'json': [True, False, False, False],
        'unknown': [True, False, False, False],
        'schema': [True, True, False, False],
        'raised': [True, True, True, False],
        'endless': [False, False, False, False],
        'never': [True, True, True, True],
    }
    counts = task.report(records).counts
    assert {key: value for key, value in counts.items() if key.startswith('errors/')} == {
        'errors/json': 1, 'errors/gave_up': 1, 'errors/unknown_tool': 1, 'errors/schema': 1,
        'errors/raised': 1, 'errors/not_ended': 1, 'errors/turn_limit': 1,
    }  # fmt: skip
    assert by_word['never']['turns'] == by_word['never']['calls'] == 4


def test_time_and_room_end_a_question(tokenizer, tmp_path: Path) -> None:
    def sleep(seconds: float) -> str:
        """Sleep."""
        raise AssertionError('it is never run in earnest')

    slow = tool(sleep, seconds=0.05)
    rows = [{'question': 'Sleep!', 'answer': 'x'}]

    def sleeping(prompt: str) -> str:
        return CALL % ('sleep', '{"seconds": 1}')

    task = prepared(rows, tmp_path, tokenizer, tools=[slow], seconds=1e-9)
    (record,) = records_of(task, sleeping, tokenizer)
    assert record['status'] == 'time_limit' and record['turns'] == 1
    assert 'time_limit' in record['errors']
    task = prepared(rows, tmp_path, tokenizer, tools=[slow], max_turns=50)
    room = len(task.prompts.encode([{'role': 'user', 'content': 'Sleep!'}], slow_tools(slow)))
    task = prepared(
        rows, tmp_path, tokenizer, room + 300, tools=[slow], max_turns=50, max_new_tokens=250
    )
    (record,) = records_of(task, sleeping, tokenizer)
    assert record['status'] == 'too_long' and 1 < record['turns'] < 50


def slow_tools(one) -> list[dict]:
    return [one.declaration()]


def test_records_to_train_on_are_questions(tokenizer, tmp_path: Path) -> None:
    calling = {'role': 'assistant', 'content': '', 'tool_calls': [
        {'id': 'a', 'type': 'function', 'function': {'name': 'double', 'arguments': {'n': 4}}},
    ]}  # fmt: skip
    asked = {'role': 'user', 'content': 'Twice 4?'}
    result = {'role': 'tool', 'tool_call_id': 'a', 'content': '8'}
    rows = [
        {'messages': [asked, calling, result, {'role': 'assistant', 'content': '8'}], 'answer': 8},
        {'messages': [asked, {'role': 'assistant', 'content': 'Hi'}], 'answer': 'Hi', 'tools': []},
    ]
    task = prepared(rows, tmp_path, tokenizer)
    records = records_of(task, lambda prompt: 'hi' if 'double' not in prompt else '8', tokenizer)
    assert [record['needs_tool'] for record in records] == [True, False]
    assert [record['right'] for record in records] == [True, True]
    template = build_template('internlm2')
    assert records[1]['prompt'] == template.text([asked], add_generation_prompt=True)


@pytest.mark.parametrize(
    ('options', 'row', 'words'),
    [
        ({'compare': 'numbr'}, {}, "compare='numbr' is unknown. Did you mean 'number'?"),
        ({'tools': ['tests.scripted.nothing']}, {}, "'tests.scripted.nothing' is not found"),
        ({'sandbox': {'limits': {}}}, {}, 'sandbox does nothing with interpreter=False'),
        ({'interpreter': True, 'sandbox': {'backnd': 'auto'}}, {}, "Did you mean 'backend'?"),
        ({'interpreter': True, 'sandbox': {'limits': {'secons': 1}}}, {}, "mean 'seconds'?"),
        ({'at_once': 0}, {}, 'at_once=0 must be at least 1'),
        ({'max_turns': 0}, {}, 'max_turns=0'),
        ({}, {'answer': None}, "field 'answer' is null"),
        ({}, {'needs_tool': 1}, 'needs_tool: true or false'),
        ({}, {'tools': ['dubble']}, "the task has no 'dubble'. Did you mean 'double'?"),
        ({}, {'question': 'x' * 5000}, 'do not fit into max_seq_len=4096'),
    ],
)
def test_what_is_refused(options: dict, row: dict, words: str, tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        prepared([{'question': 'x', 'answer': '1', **row}], tmp_path, tokenizer, **options)
    assert words in str(refused.value)


def test_without_a_sandbox_nothing_begins(tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr('internlm_mm.sandbox.sandbox.missing', lambda name: f'{name} is not here')
    with pytest.raises(ValueError, match=r'(?s)need a sandbox: no sandbox.*bubblewrap is not here'):
        prepared([{'question': 'x', 'answer': '1'}], tmp_path, tokenizer, interpreter=True)


@pytest.fixture(scope='module')
def _sandbox() -> None:
    try:
        Sandbox(spare=0).close()
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures('_sandbox')
def test_code_runs_in_a_session_for_each_question(tokenizer, tmp_path: Path) -> None:
    rows = [{'question': f'n{n}?', 'answer': n * n} for n in (3, 4)]
    rows.append({'question': 'hang', 'answer': '1'})

    def say(prompt: str) -> str:
        if 'hang' in prompt:
            return 'It took too long' if 'LimitError' in prompt else CODE % 'while True: pass'
        n = 3 if 'n3' in prompt else 4
        if prompt.count('environment') == 0:
            return CODE % f'x = globals().get("x", 0) + {n}'
        if prompt.count('environment') == 1:
            return CODE % 'x * x'
        return f'It is {n * n}' if f'\n{n * n}[' in prompt else prompt[-60:]

    task = prepared(
        rows, tmp_path, tokenizer, interpreter=True, sandbox={'limits': {'seconds': 0.7}}
    )
    records = records_of(task, say, tokenizer)
    assert [record['right'] for record in records] == [True, True, False]
    assert [record['errors'] for record in records] == [[], [], ['timeout']]
    assert not task._desks and task.programs._sandbox is None


@pytest.mark.slow
@pytest.mark.usefixtures('_sandbox')
def test_a_model_that_learned_its_lines_is_scored_by_the_command(tmp_path: Path) -> None:
    lines = {
        '17 * 23?': ('python', {'code': 'print(17 * 23)'}, '391'),
        'Twice 4?': ('double', {'n': 4}, '8'),
        'hello': None,
    }
    learned = []
    for question, called in lines.items():
        asked = [{'role': 'user', 'content': question}]
        if called is None:
            learned.append([*asked, {'role': 'assistant', 'content': 'Hi.'}])
            continue
        name, arguments, result = called
        learned.append([
            *asked,
            {'role': 'assistant', 'content': '', 'tool_calls': [call(name, arguments, 'a')]},
            {'role': 'tool', 'tool_call_id': 'a', 'content': result},
            {'role': 'assistant', 'content': f'It is {result}.'},
        ])  # fmt: skip
    tools = [tool(double).declaration(), PYTHON.declaration()]
    long = [{'role': 'user', 'content': 'Long?'}, {'role': 'assistant', 'content': 'return ' * 150}]
    work = learn_chat(tmp_path, 'internlm2', 200, [*learned, long], tools)
    rows = [
        {'messages': said, 'answer': said[-1]['content'], 'subject': question}
        for said, question in zip(learned, lines, strict=True)
    ]
    path = write_jsonl(tmp_path / 'rows.jsonl', rows)
    gold = [{'messages': said, 'tools': tools} for said in learned]
    calls = write_jsonl(tmp_path / 'calls.jsonl', gold)
    shared = dict(chat_template='internlm2', max_new_tokens=80)
    tasks = [
        dict(type='AgentTask', path=str(path), tools=[f'{__name__}.double'], **shared),
        dict(type='AgentTask', path=str(path), name='bare', interpreter=False, **shared),
        dict(type='ToolCallTask', path=str(calls), **shared),
    ]
    config = tmp_path / 'tasks.py'
    config.write_text(f"val_cfg = dict(type='PerplexityLoop', tasks={tasks!r})\n")
    found = evaluate(config, checkpoint=work, output=tmp_path / 'out')
    assert found['agent/accuracy'] == found['agent/execution'] == 1.0
    assert found['agent/called_when_not_needed'] == 0.0
    assert found['agent/turns'] == pytest.approx(5 / 3)
    assert found['bare/valid_call'] == 0.0
    for metric in ('accuracy', 'valid_call', 'schema_valid', 'ast_match', 'irrelevance'):
        assert found[f'tool_calls/{metric}'] == 1.0
    records = (tmp_path / 'out' / 'agent.jsonl').read_text().splitlines()
    said = [(one['role'], one['content']) for one in json.loads(records[0])['messages']]
    assert said == [(one['role'], one['content']) for one in learned[0]]
