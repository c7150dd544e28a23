"""Calls that are compared: what a scripted model writes, in two templates."""

from pathlib import Path

import pytest

from internlm_mm.evaluation import Subject, ToolCallTask
from tests.conversations import PLAIN, WEATHER, internlm_model
from tests.questions import write_jsonl
from tests.scripted import records_of
from tests.test_evaluation.test_tool_cases import write_bfcl

CALL = '<|action_start|><|plugin|>\n{"name": "%s", "parameters": %s}<|action_end|>'
RIGHT = CALL % ('weather', '{"city": "Rome"}')


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return internlm_model(tmp_path_factory.mktemp('tokenizer') / 'model')


def row(word: str, *cities: str) -> dict:
    expected = [{'name': 'weather', 'arguments': {'city': [city]}} for city in cities]
    asked = [{'role': 'user', 'content': f'{word}?'}]
    return {'messages': asked, 'tools': [WEATHER], 'expected': expected}


def test_rates_and_classes_of_errors(tokenizer, tmp_path: Path) -> None:
    said = {
        'right': (RIGHT, ['Rome']),
        'other': (CALL % ('weather', '{"city": "Oslo"}'), ['Rome']),
        'schema': (CALL % ('weather', '{"city": 4}'), ['Rome']),
        'unknown': (CALL % ('wether', '{"city": "Rome"}'), ['Rome']),
        'json': (CALL % ('weather', '{"city": '), ['Rome']),
        'silent': ('It is fine.', ['Rome']),
        'endless': (RIGHT + '...', ['Rome']),
        'both': (CALL % ('weather', '{"city": "b"}') + CALL % ('weather', '{"city": "a"}'),
                 ['a', 'b']),
        'none': ('Hello!', []),
        'needless': (RIGHT, []),
    }  # fmt: skip
    path = write_jsonl(tmp_path / 'rows.jsonl', [row(word, *c) for word, (_, c) in said.items()])
    task = ToolCallTask(path, 'internlm2')
    task.prepare(Subject(tokenizer, 4096))

    def say(prompt: str) -> str:
        return next(text for word, (text, _) in said.items() if f'{word}?' in prompt)

    records = records_of(task, say, tokenizer)
    by_word = dict(zip(said, records, strict=True))
    assert [word for word, one in by_word.items() if one['right']] == ['right', 'both', 'none']
    assert {word: one['errors'] for word, one in by_word.items() if one['errors']} == {
        'other': ['match_value'],
        'schema': ['schema', 'match_type'],
        'unknown': ['unknown_tool', 'match_function'],
        'json': ['json'],
        'silent': ['no_call'],
        'endless': ['trailing', 'not_ended'],
        'needless': ['unneeded_call'],
    }
    report = task.report(records)
    assert report.metrics == {
        'accuracy': 0.3,
        'accuracy_by_category': pytest.approx((1 / 7 + 1 + 1 / 2) / 3),
        'valid_call': pytest.approx(4 / 8),
        'schema_valid': pytest.approx(3 / 8),
        'ast_match': pytest.approx(2 / 8),
        'irrelevance': 0.5,
    }
    assert report.details['accuracy'] == {
        'simple': pytest.approx(1 / 7), 'parallel': 1.0, 'irrelevance': 0.5
    }  # fmt: skip
    assert report.counts['errors/json'] == 1 and report.counts['samples'] == 10
    assert by_word['right']['prediction'] == [{'name': 'weather', 'arguments': {'city': 'Rome'}}]


def test_the_leaderboard_in_a_template_of_one_call_a_turn(tokenizer, tmp_path: Path) -> None:
    task = ToolCallTask(write_bfcl(tmp_path), 'internlm_v1_1', format='bfcl')
    task.prepare(Subject(tokenizer, 4096))

    def say(prompt: str) -> str:
        if 'The area?' in prompt:
            return 'Thought:I ask.\nAction:math.area\nActionInput:{"base": 10, "height": 5}'
        return 'FinalAnswer:Hello'

    records = records_of(task, say, tokenizer)
    assert [record['right'] for record in records] == [True, True]
    assert set(task.report(records).details['accuracy']) == {'simple_python', 'live_irrelevance'}
    assert '"type": "number"' in records[1]['prompt']


def test_what_is_refused_and_left_out(tokenizer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / 'rows.jsonl', [row('x', 'Rome'), row('y' * 2000, 'Rome')])
    with pytest.raises(ValueError, match="chat_template='internlm' spells no functions"):
        ToolCallTask(path, 'internlm')
    with pytest.raises(ValueError, match=r"format='messges'.*Did you mean 'messages'"):
        ToolCallTask(path, 'internlm2', format='messges')
    with pytest.raises(ValueError, match='max_samples=0'):
        ToolCallTask(path, 'internlm2', max_samples=0)
    task = ToolCallTask(path, 'internlm2', max_new_tokens=32, on_error='skip')
    task.prepare(Subject(tokenizer, 900))
    assert len(task) == 1
    with pytest.raises(ValueError, match=r'rows.jsonl:2.*do not fit into max_seq_len=900'):
        ToolCallTask(path, 'internlm2', max_new_tokens=32).prepare(Subject(tokenizer, 900))
    bare = write_jsonl(tmp_path / 'bare.jsonl', [{'messages': PLAIN}])
    with pytest.raises(ValueError, match='has no question'):
        ToolCallTask(bare, 'internlm2').prepare(Subject(tokenizer, 900))


def test_one_category_is_all_there_is(tokenizer, tmp_path: Path) -> None:
    task = ToolCallTask(write_jsonl(tmp_path / 'rows.jsonl', [row('x', 'Rome')]), 'internlm2')
    task.prepare(Subject(tokenizer, 4096))
    report = task.report(records_of(task, lambda prompt: RIGHT, tokenizer))
    assert report.metrics == dict.fromkeys(
        ('accuracy', 'accuracy_by_category', 'valid_call', 'schema_valid', 'ast_match'), 1.0
    )
    assert report.details == {}
