"""Cases of conversations, and of files in the leaderboard's form."""

import json
from pathlib import Path

import pytest

from internlm_mm.evaluation.ast_match import Expected
from internlm_mm.evaluation.few_shot import Source
from internlm_mm.evaluation.tool_cases import (
    accepted_of,
    bfcl_files,
    case_format,
    check_case_format,
    json_schema,
)
from tests.conversations import CALLING, PLAIN, TOOLS, WEATHER

AREA = {
    'name': 'math.area',
    'description': 'Area of a triangle.',
    'parameters': {
        'type': 'dict',
        'properties': {
            'base': {'type': 'integer'},
            'height': {'type': 'float'},
            'corner': {'type': 'tuple', 'items': {'type': 'float'}},
            'note': {'type': 'any'},
            'options': {'type': 'dict', 'properties': {'unit': {'type': 'string'}}},
        },
        'required': ['base', 'height'],
    },
}


def question(number: int, category: str, **changes) -> dict:
    asked = [{'role': 'user', 'content': 'The area?'}]
    return {'id': f'{category}_{number}', 'question': [asked], 'function': [AREA], **changes}


def lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


def write_bfcl(folder: Path) -> Path:
    """Two files of questions and one of answers, as they are published."""
    lines(folder / 'BFCL_v4_simple_python.json', [question(0, 'simple_python')])
    right = {'math.area': {'base': [10], 'height': [5.0, 5], 'note': ['x', '']}}
    lines(
        folder / 'possible_answer' / 'BFCL_v4_simple_python.json',
        [{'id': 'simple_python_0', 'ground_truth': [right]}],
    )
    two = [[{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi'},
            {'role': 'user', 'content': 'you'}]]  # fmt: skip
    lines(
        folder / 'BFCL_v4_live_irrelevance.json',
        [question('0-0-0', 'live_irrelevance', question=two)],
    )
    lines(folder / 'BFCL_v4_multi_turn_base.json', [{'id': 'multi_turn_base_0'}])
    return folder


def read(format: str, rows: list[dict], files=()) -> list:
    form = case_format(format, files)
    return [case for row in rows for case in form.read(row)]


def test_files_of_the_leaderboard(tmp_path: Path) -> None:
    files = bfcl_files(write_bfcl(tmp_path), None)
    assert [file.name for file in files] == [
        'BFCL_v4_live_irrelevance.json', 'BFCL_v4_simple_python.json'
    ]  # fmt: skip
    form = case_format('bfcl', files)
    source = Source('calls', form, True, 'raise', lambda case, place, _: (case, place))
    (none, _), (area, place) = [one for file in files for one in source.read(file, None, 'path')]
    assert place == f'{files[1]}: record 1'
    assert area.subject == 'simple_python'
    assert area.expected == (
        Expected('math.area', {'base': [10], 'height': [5.0, 5], 'note': ['x', '']}),
    )
    assert area.schemas == {'math.area': AREA['parameters']}
    assert area.tools[0]['function']['parameters'] == {
        'type': 'object',
        'properties': {
            'base': {'type': 'integer'},
            'height': {'type': 'number'},
            'corner': {'type': 'array', 'items': {'type': 'number'}},
            'note': {},
            'options': {'type': 'object', 'properties': {'unit': {'type': 'string'}}},
        },
        'required': ['base', 'height'],
    }
    assert none.subject == 'live_irrelevance' and none.expected == ()
    assert none.messages[1] == {'role': 'user', 'content': 'Hi\nyou'}
    assert bfcl_files(tmp_path, 'simple_python') == files[1:]
    assert bfcl_files(files[0], None) == files[:1]


def test_what_the_leaderboard_has_not(tmp_path: Path) -> None:
    write_bfcl(tmp_path)
    with pytest.raises(ValueError, match=r"split='simple_pyton'.*Did you mean 'simple_python'"):
        bfcl_files(tmp_path, 'simple_pyton')
    with pytest.raises(FileNotFoundError, match=r'no BFCL_v4_parallel\.json'):
        bfcl_files(tmp_path, 'parallel')
    (tmp_path / 'possible_answer' / 'BFCL_v4_simple_python.json').unlink()
    with pytest.raises(FileNotFoundError, match=r'answers to .* should be in .*possible_answer'):
        case_format('bfcl', bfcl_files(tmp_path, None))


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'id': 'simple_java_0'}, "'simple_java' is none of the categories"),
        ({'id': 'simple_python_7'}, 'there is no answer of that id'),
        ({'question': [[], []]}, 'a list with one turn'),
        ({'question': [[{'role': 'user'}]]}, 'question[0][0]'),
        ({'function': {}}, 'function: a list, not dict'),
        ({'function': [{'name': 'a b'}]}, "function[0].name 'a b'"),
        ({'function': [{**AREA, 'parameters': {'type': 'dct'}}]}, 'function[0].parameters'),
        ({'function': [{**AREA, 'name': 'other'}]}, "no function 'math.area'"),
    ],
)
def test_malformed_rows_of_the_leaderboard(changes: dict, words: str, tmp_path: Path) -> None:
    form = case_format('bfcl', bfcl_files(write_bfcl(tmp_path), 'simple_python'))
    with pytest.raises(ValueError) as refused:
        list(form.read(question(0, 'simple_python', **changes)))
    assert words in str(refused.value)


def test_each_answer_of_a_conversation_is_a_case() -> None:
    cases = read('messages', [{'messages': CALLING, 'tools': TOOLS}])
    assert [case.subject for case in cases] == ['multiple', 'multiple', 'answer']
    assert [len(case.messages) for case in cases] == [2, 4, 6]
    assert cases[0].expected == (Expected('python', {'code': ['print(6 * 7)']}),)
    assert cases[1].expected == (Expected('weather', {'city': ['上海'], 'days': [[1, None]]}),)
    silent = [*CALLING[:2], {**CALLING[2], 'loss': False}, *CALLING[3:]]
    assert len(read('messages', [{'messages': silent, 'tools': TOOLS}])) == 2
    (first, _) = read('messages', [{'messages': PLAIN, 'tools': [WEATHER]}])
    assert first.subject == 'irrelevance' and first.expected == ()
    assert read('messages', [{'messages': PLAIN}]) == []
    two = {'role': 'assistant', 'content': None, 'tool_calls': [
        {'function': {'name': 'weather', 'arguments': {'city': city}}} for city in 'ab'
    ]}  # fmt: skip
    (case,) = read('messages', [{'messages': [*PLAIN[:2], two], 'tools': [WEATHER]}])
    assert case.subject == 'parallel'


def test_other_forms_of_conversations() -> None:
    row = {
        'id': 1,
        'query': 'Weather in Rome?',
        'tools': json.dumps([{'name': 'weather', 'description': '', 'parameters': {
            'city': {'type': 'str', 'description': 'It.'}}}]),
        'answers': json.dumps([{'name': 'weather', 'arguments': {'city': 'Rome'}}]),
    }  # fmt: skip
    assert read('auto', [row, {'messages': PLAIN, 'tools': [WEATHER]}])[:1] == read('xlam', [row])
    (case,) = read('xlam', [row])
    assert case.subject == 'simple' and case.expected[0].arguments == {'city': ['Rome']}


def test_expected_calls_in_a_row() -> None:
    row = {'messages': PLAIN[:2], 'tools': [WEATHER]}
    expected = [{'name': 'weather', 'arguments': {'city': ['Rome', 'Roma'], 'days': [1, '']}}]
    (case,) = read('messages', [{**row, 'expected': expected}])
    assert case.expected == (Expected('weather', expected[0]['arguments']),)
    (case,) = read('messages', [{**row, 'expected': []}])
    assert case.subject == 'irrelevance'
    for wrong, words in (
        ({}, 'expected: a list'),
        ([3], 'expected[0]: an object'),
        ([{'name': 'a b'}], 'expected[0].name'),
        ([{'name': 'weather', 'arguments': {'city': 'Rome'}}], 'arguments.city: a list'),
        ([{'name': 'weather', 'arguments': []}], 'arguments: an object'),
    ):
        with pytest.raises(ValueError) as refused:
            read('messages', [{**row, 'expected': wrong}])
        assert words in str(refused.value)
    with pytest.raises(ValueError, match="last message is of 'assistant'"):
        read('messages', [{'messages': PLAIN, 'expected': []}])


def test_defaults_may_be_said_or_left_out() -> None:
    schema = {
        'properties': {
            'city': {'type': 'string'},
            'days': {'type': 'integer', 'default': 1},
            'at': {'type': 'object', 'default': {'x': 1}},
            'points': {'type': 'array', 'items': {'type': 'object'}},
        },
        'required': ['city'],
    }
    said = {'city': 'Rome', 'days': 1, 'points': [{'x': 1}]}
    assert accepted_of(said, schema) == {
        'city': ['Rome'],
        'days': [1, ''],
        'points': [[{'x': [1]}]],
        'at': [{'x': [1]}, ''],
    }
    assert accepted_of({'city': 'Rome', 'days': 2}, schema)['days'] == [2]


def test_types_of_the_leaderboard_become_those_of_json_schema() -> None:
    given = {'type': 'array', 'items': {'type': 'dict', 'additionalProperties': {'type': 'float'}}}
    assert json_schema(given) == {
        'type': 'array',
        'items': {'type': 'object', 'additionalProperties': {'type': 'number'}},
    }
    assert json_schema({'type': 'any', 'optional': True, 'description': 'x'}) == {
        'description': 'x'
    }
    with pytest.raises(ValueError, match=r"format='bfc'.*Did you mean 'bfcl'"):
        check_case_format('bfc')
