"""A sample as xlam-function-calling-60k has them."""

import json

import jsonschema
import pytest

from internlm_mm.datasets.conversation_formats import detect_format
from internlm_mm.datasets.converting import convert_record
from internlm_mm.datasets.forms.xlam import TYPE_KEY, read, write

PARAMETERS = {
    'place': {'description': 'A city.', 'type': 'str'},
    'days': {'description': 'How many.', 'type': 'int, optional', 'default': 3},
    'limits': {'description': 'Both.', 'type': 'List[float]'},
    'deep': {'description': 'Deeper.', 'type': 'List[List[int]]'},
    'test': {'description': 'Odd.', 'type': 'Callable[[float], float]'},
    'table': {'description': 'Odd.', 'type': 'Dict[str, int], optional'},
}
TOOLS = [{'name': 'live.weather', 'description': 'The weather.', 'parameters': PARAMETERS}]
ANSWERS = [
    {'name': 'live.weather', 'arguments': {'place': 'Paris', 'days': 2}},
    {'name': 'live.weather', 'arguments': {'place': '上海'}},
]
SAMPLE = {
    'id': 7,
    'query': 'Weather in Paris and 上海?',
    'answers': json.dumps(ANSWERS, ensure_ascii=False),
    'tools': json.dumps(TOOLS),
}


def test_read():
    messages, tools = read(SAMPLE)
    assert messages[0] == {'role': 'user', 'content': SAMPLE['query']}
    assert [call['function'] for call in messages[1]['tool_calls']] == ANSWERS
    schema = tools[0]['function']['parameters']
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema['required'] == ['place', 'limits', 'deep', 'test']
    properties = schema['properties']
    assert properties['place'] == {'type': 'string', 'description': 'A city.'}
    assert properties['days'] == {'type': 'integer', 'description': 'How many.', 'default': 3}
    assert properties['limits']['items'] == {'type': 'number'}
    assert properties['deep']['items']['items'] == {'type': 'integer'}
    assert properties['test'][TYPE_KEY] == 'Callable[[float], float]'
    valid = {'place': 'x', 'limits': [1.5], 'deep': [[1]], 'test': None}
    jsonschema.validate(valid, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(valid | {'deep': [['x']]}, schema)
    assert detect_format(SAMPLE) == 'xlam'


def test_nothing_is_lost():
    converted = convert_record(SAMPLE, 'xlam')
    back = convert_record(converted, 'messages', 'xlam')
    assert back == SAMPLE
    del converted['source']  # of JSON's escapes
    assert json.loads(convert_record(converted, 'messages', 'xlam')['tools']) == TOOLS


def test_irrelevant_functions_and_lists_that_are_no_text():
    messages, tools = read({'query': 'q', 'answers': [], 'tools': TOOLS})
    assert messages[1] == {'role': 'assistant', 'content': ''} and len(tools) == 1
    schema = {'type': 'object', 'properties': {}}
    tools = read(SAMPLE | {'tools': [{'name': 'f', 'parameters': schema}]})[1]
    assert tools[0]['function']['parameters'] == schema


@pytest.mark.parametrize(
    ('change', 'error'),
    [
        ({'answers': '[{'}, r'answers: no JSON'),
        ({'answers': [3]}, r'answers\[0\]: an object with name'),
        ({'tools': {'a': 1}}, 'tools: a list, not dict'),
        ({'tools': [{'name': 'f', 'parameters': {'x': 'int'}}]}, r'parameters.x: an object, not'),
        ({'tools': [{'name': 'f', 'parameters': [1]}]}, r'tools\[0\].parameters: an object'),
        ({'query': None}, "field 'query' is null"),
    ],
)
def test_malformed(change, error):
    with pytest.raises(ValueError, match=error):
        read(SAMPLE | change)


def test_what_has_no_place():
    with pytest.raises(ValueError, match='one question, and calls'):
        write([{'role': 'user', 'content': 'q'}], [])
    tool = {'function': {'name': 'f', 'parameters': {'properties': {'x': {'enum': [1]}}}}}
    messages = read(SAMPLE)[0]
    with pytest.raises(ValueError, match=r'no type for {"enum": \[1\]}'):
        write(messages, [tool])
