import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from internlm_mm.datasets.conversation_formats import (
    Example,
    check_format,
    detect_format,
    read_examples,
)
from internlm_mm.tokenizers.chat_messages import read_conversation
from tests.conversations import CALLING, PLAIN, TOOLS, WEATHER

Q, A = {'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}
S = {'role': 'system', 'content': 's'}


def read(folder: Path, *records: Any, format: str = 'auto', name: str = 'c.jsonl') -> list:
    path = folder / name
    path.write_text('\n'.join(json.dumps(record) for record in records))
    return list(read_examples(path, format))


CASES: list[tuple[dict, str, list[dict]]] = [
    ({'messages': PLAIN, 'id': 7}, 'messages', PLAIN),
    ({'messages': json.dumps(PLAIN)}, 'messages', PLAIN),
    ({'messages': [Q, {**A, 'weight': 0}]}, 'messages', [Q, {**A, 'loss': False}]),
    ({'messages': [Q, {**A, 'loss': 0, 'weight': 0}]}, 'messages', [Q, {**A, 'loss': False}]),
    ({'messages': [Q, {**A, 'loss': 1}]}, 'messages', [Q, {**A, 'loss': True}]),
    ({'messages': [Q, {**A, 'loss': False, 'name': None}]}, 'messages', [Q, {**A, 'loss': False}]),
    ({'instruction': 'q', 'output': 'a'}, 'alpaca', [Q, A]),
    (
        {'instruction': 'q', 'input': 'more', 'output': 'a', 'system': 's'},
        'alpaca',
        [S, {'role': 'user', 'content': 'q\nmore'}, A],
    ),
    (
        {'instruction': 'q', 'input': '', 'output': 'a', 'history': [['q', 'a'], ['q', 'a']]},
        'alpaca',
        [Q, A, Q, A, Q, A],
    ),
    (
        {'conversations': [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}]},
        'sharegpt',
        [Q, A],
    ),
    (
        {
            'system': 's',
            'conversations': [
                {'from': 'user', 'value': 'q'},
                {'from': 'function_call', 'value': '{"name": "f", "arguments": {"x": 1}}'},
                {'from': 'observation', 'value': '2'},
                {'from': 'assistant', 'value': 'a', 'loss': False},
            ],
        },
        'sharegpt',
        [
            S,
            Q,
            {
                'role': 'assistant',
                'content': None,
                'tool_calls': [
                    {'type': 'function', 'function': {'name': 'f', 'arguments': {'x': 1}}}
                ],
            },
            {'role': 'tool', 'content': '2'},
            {**A, 'loss': False},
        ],
    ),
    ({'prompt': 'q', 'answer': 'a'}, 'prompt_answer', [Q, A]),
    ({'prompt': 'q', 'completion': 'a', 'system': 's'}, 'prompt_answer', [S, Q, A]),
    ({'question': 'q', 'answer': 'a', 'level': 3}, 'prompt_answer', [Q, A]),
]


@pytest.mark.parametrize(('record', 'format', 'messages'), CASES)
def test_forms(tmp_path: Path, record: dict, format: str, messages: list[dict]) -> None:
    expected = [Example(messages, [], f'{tmp_path}/c.jsonl:1', format)]
    assert detect_format(record) == format
    assert read(tmp_path, record) == read(tmp_path, record, format=format) == expected


@pytest.mark.parametrize('tools', [TOOLS, json.dumps(TOOLS), [tool['function'] for tool in TOOLS]])
def test_functions_and_calls(tmp_path: Path, tools: Any) -> None:
    [example] = read(tmp_path, {'messages': CALLING, 'tools': tools})
    assert example.tools == TOOLS
    kept = [{k: v for k, v in message.items() if v is not None} for message in CALLING]
    assert example.messages == kept


def test_calls_as_openai_had_them_in_2023(tmp_path: Path) -> None:
    function = {'name': 'f', 'arguments': '{"x": 1}'}
    record = {
        'messages': [
            Q,
            {'role': 'assistant', 'content': None, 'function_call': function},
            {'role': 'function', 'name': 'f', 'content': '2'},
            A,
        ],
        'functions': [WEATHER['function']],
    }
    [example] = read(tmp_path, record)
    assert example.tools == [WEATHER]
    assert example.messages == [
        Q,
        {'role': 'assistant', 'tool_calls': [{'type': 'function', 'function': function}]},
        {'role': 'tool', 'name': 'f', 'content': '2'},
        A,
    ]
    read_conversation(example.messages, example.tools)


def test_every_ending(tmp_path: Path) -> None:
    records = [{'messages': PLAIN}, {'messages': [Q, A]}]
    expected = [example.messages for example in read(tmp_path, *records)]
    (tmp_path / 'c.json').write_text(json.dumps(records))
    lines = '\n'.join(map(json.dumps, records)).encode()
    (tmp_path / 'c.jsonl.gz').write_bytes(gzip.compress(lines))
    for name in ('c.json', 'c.jsonl.gz'):
        found = list(read_examples(tmp_path / name))
        assert [example.messages for example in found] == expected


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip('pyarrow')
    from pyarrow import parquet

    path = tmp_path / 'c.parquet'
    plain = [{'messages': [Q, A]}, {'messages': PLAIN}]
    parquet.write_table(arrow.Table.from_pylist(plain), path)
    assert [example.messages for example in read_examples(path)] == [[Q, A], PLAIN]
    text = [{'messages': json.dumps(CALLING), 'tools': json.dumps(TOOLS)}]
    parquet.write_table(arrow.Table.from_pylist(text), path)
    [example] = read_examples(path)
    assert example.messages[2] == CALLING[2] and example.tools == TOOLS
    parquet.write_table(arrow.Table.from_pylist([{'messages': [Q, A], 'tools': [WEATHER]}]), path)
    [error] = read_examples(path)
    assert 'c.parquet:1, tools[0].function.parameters: parquet gives' in str(error)
    assert "store the column 'tools' as JSON text" in str(error)


BAD = [
    ({'messages': 'no json'}, 'messages: no JSON'),
    ({'messages': None}, "field 'messages' is null"),
    ({'messages': {'role': 'user'}}, 'messages: a list, not dict'),
    ({'messages': ['q']}, 'message 0: an object with role and content, not str'),
    ({'messages': [Q, {**A, 'weight': 2}]}, 'message 1: weight 2: 0 or 1'),
    ({'messages': [Q, {**A, 'weight': 0, 'loss': True}]}, 'message 1: loss True beside weight 0'),
    ({'messages': [Q, {**A, 'weight': 1, 'loss': 0}]}, 'message 1: loss 0 beside weight 1: they'),
    ({'messages': [Q, {**A, 'loss': []}]}, 'message 1: loss []: true or false'),
    (
        {'conversations': [{'from': 'gpt', 'value': 'a', 'loss': True, 'weight': 0}]},
        'conversations[0].loss True beside weight 0',
    ),
    ({'messages': [Q, {**A, 'content': '\ud800'}]}, 'message 1: the text has a lone surrogate'),
    ({'messages': [Q, A], 'tools': '['}, 'tools: no JSON'),
    ({'messages': [Q, A], 'tools': {'x': 1}}, 'tools: a list, not dict'),
    ({'instruction': 'q', 'output': None}, "field 'output' is null"),
    ({'instruction': 'q', 'output': 3}, 'output: a text, not int'),
    ({'instruction': 'q', 'output': 'a', 'input': 4}, 'input: a text, not int'),
    ({'instruction': 'q', 'output': 'a', 'history': ['qa']}, "history[0]: a question and an"),
    ({'instruction': 'q', 'output': 'a', 'history': [[1, 'a']]}, 'history[0]: a text, not int'),
    ({'conversations': [{'from': 'hunan', 'value': 'q'}]}, "is none. Did you mean 'human'?"),
    ({'instruction': 'Q', 'output': ' '}, 'output is empty, and an empty answer would be'),
    ({'question': 'Q', 'answer': ''}, 'answer is empty, and an empty answer would be learned'),
    ({'conversations': [{'from': 'human'}]}, 'conversations[0].value: a text, not null or missing'),
    ({'conversations': ['q']}, 'conversations[0]: an object with from and value, not str'),
    ({'conversations': [{'from': 'function_call', 'value': 'f()'}]}, '[0].value: no JSON'),
    ({'conversations': [{'from': 'gpt', 'value': 'a', 'loss': 5}]}, '[0].loss 5: true or false'),
    ({'prompt': ['q'], 'answer': 'a'}, 'prompt: a text, not list'),
]  # fmt: skip


@pytest.mark.parametrize(('record', 'message'), BAD)
def test_malformed_records_name_line_and_field(tmp_path: Path, record: dict, message: str) -> None:
    good = {key: {'messages': [Q, A]}.get(key, 'x') for key in record}
    good |= {'conversations': []} if 'conversations' in record else {}
    good.pop('tools', None)
    good.pop('history', None)
    first, error, last = read(tmp_path, good, record, good)
    assert isinstance(first, Example) and isinstance(last, Example)
    assert isinstance(error, ValueError)
    assert str(error).startswith(f'{tmp_path}/c.jsonl:2, ') and message in str(error)


def test_a_record_of_another_form(tmp_path: Path) -> None:
    found = read(tmp_path, {'messages': [Q, A]}, {'prompt': 'q', 'answer': 'a'}, 'text')
    assert "c.jsonl:2, field 'messages' is missing" in str(found[1])
    assert 'c.jsonl:3: an object is expected, not str' in str(found[2])
    [error] = read(tmp_path, {'messages': [Q, A]}, format='prompt_answer')
    assert 'field missing, one pair of: prompt and answer' in str(error)


def test_what_auto_cannot_tell(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"c\.jsonl:1: the keys 'text' are of no form"):
        read(tmp_path, {'text': 'x'})
    with pytest.raises(ValueError, match=r"and output\. Did you mean 'messages' by 'massages'\?"):
        read(tmp_path, {'id': 1, 'massages': []})
    with pytest.raises(ValueError, match=r"format='alpacca' is none of .* mean 'alpaca'"):
        check_format('alpacca')
    (tmp_path / 'a.txt').touch()
    with pytest.raises(ValueError, match=r"cannot read '\.txt', only \.json"):
        list(read_examples(tmp_path / 'a.txt'))


def test_broken_json_is_an_error_of_the_file(tmp_path: Path) -> None:
    (tmp_path / 'c.jsonl').write_text(json.dumps({'messages': [Q, A]}) + '\n{"messages": [')
    with pytest.raises(ValueError, match=r'c\.jsonl:2: not JSON'):
        list(read_examples(tmp_path / 'c.jsonl'))


def test_who_keeps_going_gets_every_error_in_its_place(tmp_path: Path) -> None:
    good = json.dumps({'messages': [Q, A]})
    lines = ['{', good, '{"messages": NaN}', json.dumps({'messages': 3}), good, '[']
    (tmp_path / 'c.jsonl').write_text('\n'.join(lines))
    found = list(read_examples(tmp_path / 'c.jsonl', keep_going=True))
    places = [str(f if isinstance(f, ValueError) else f.place) for f in found]
    for number, place in enumerate(places, 1):
        assert place.startswith(f'{tmp_path}/c.jsonl:{number}'), places
    assert [isinstance(f, Example) for f in found] == [False, True, False, False, True, False]
    only = tmp_path / 'none.jsonl'
    only.write_text('{')
    assert [str(f) for f in read_examples(only, keep_going=True)] == [
        f'{only}:1: not JSON: Expecting property name enclosed in double quotes (column 2)'
    ]
