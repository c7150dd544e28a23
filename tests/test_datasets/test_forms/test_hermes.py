"""A sample as hermes-function-calling-v1 has them."""

import json
import time

import pytest

from internlm_mm.datasets.conversation_formats import detect_format
from internlm_mm.datasets.converting import convert_record
from internlm_mm.datasets.forms.hermes import read, write

TOOL = {
    'type': 'function',
    'function': {
        'name': 'get_camera',
        'description': "A camera's feed.",
        'parameters': {'type': 'object', 'properties': {'id': {'type': 'string'}}},
    },
}
SYSTEM = (
    'You are a function calling AI model. You are provided with function signatures within '
    '<tools> </tools> XML tags. You may call one or more functions to assist with the user query. '
    f"Don't make assumptions about what values to plug into functions.\n<tools>\n{[TOOL]}\n"
    '</tools>\nFor each function call return a json object with function name and arguments within '
    '<tool_call> </tool_call> tags with the following schema:\n<tool_call>\n'
    "{'arguments': <args-dict>, 'name': <function-name>}\n</tool_call>\n"
)
SAMPLE = {
    'id': '4b5f',
    'conversations': [
        {'from': 'system', 'value': SYSTEM},
        {'from': 'human', 'value': 'Show me both cameras.'},
        {
            'from': 'gpt',
            'value': 'Yes.\n<tool_call>\n{"name": "get_camera", "arguments": {"id": "front"}}\n'
            "</tool_call>\n<tool_call>\n{'arguments': {'id': 'back'}, 'name': 'get_camera'}\n"
            '</tool_call>\n',
        },
        {
            'from': 'tool',
            'value': '<tool_response>\n{"feed": 1}\n</tool_response>\n<tool_response>\n{"feed": 2}'
            '\n</tool_response>',
        },
        {'from': 'gpt', 'value': 'Here they are.'},
    ],
    'tools': json.dumps([TOOL]),
    'category': 'IoT',
}


def test_read():
    messages, tools = read(SAMPLE)
    assert tools == [TOOL]
    assert [m['role'] for m in messages] == ['user', 'assistant', 'tool', 'tool', 'assistant']
    assert messages[1]['content'] == 'Yes.'
    assert [call['function'] for call in messages[1]['tool_calls']] == [
        {'name': 'get_camera', 'arguments': {'id': which}} for which in ('front', 'back')
    ]
    assert [m['content'] for m in messages[2:4]] == ['{"feed": 1}', '{"feed": 2}']
    assert detect_format(SAMPLE) == 'hermes'


def test_functions_of_the_systems_text():
    record = {key: value for key, value in SAMPLE.items() if key != 'tools'}
    assert read(record) == read(SAMPLE)
    lines = f'A\n<tools>\n{json.dumps(TOOL)}\n{json.dumps(TOOL["function"])}\n</tools>'
    messages, tools = read({'conversations': [{'from': 'system', 'value': lines}]})
    assert tools == [TOOL, TOOL] and messages[0]['content'] == 'A\n<tools></tools>'


def test_what_else_the_system_says_stays():
    turns = [{'from': 'system', 'value': SYSTEM + 'Be brief.'}, *SAMPLE['conversations'][1:]]
    messages, tools = read({'conversations': turns})
    assert messages[0] == {'role': 'system', 'content': 'Be brief.'}
    assert read(write(messages, tools)) == (messages, tools)


def test_nothing_is_lost():
    converted = convert_record(SAMPLE, 'hermes')
    assert converted['category'] == 'IoT'
    assert convert_record(converted, 'messages', 'hermes') == SAMPLE


@pytest.mark.parametrize(
    ('text', 'error'),
    [
        ('<tool_call>\n{"name": "f", \n</tool_call>', r'\[0\].value, <tool_call>: neither JSON'),
        ('<tool_call>\n[1]\n</tool_call>', 'an object with name and arguments'),
        ('<tool_call>\n{"name": "f"}', 'something else behind or inside a <tool_call>'),
        ('<tool_call>{"name": "f"}</tool_call> and', 'something else behind or inside'),
        ("<tool_call>\n{'name': f()}\n</tool_call>", 'nor a literal'),
    ],
)
def test_malformed(text, error):
    with pytest.raises(ValueError, match=error):
        read({'conversations': [{'from': 'gpt', 'value': text}]})


@pytest.mark.parametrize('mark', ['<tools>', '<tool_call>', '<tool_response>', '\n \n'])
def test_marks_without_end_take_no_time(mark):
    start = time.monotonic()
    for speaker in ('system', 'gpt', 'tool'):
        text = 'You are a function calling AI model.' + mark * 20_000
        try:
            read({'conversations': [{'from': speaker, 'value': text}]})
        except ValueError:
            assert speaker == 'gpt'
    assert time.monotonic() - start < 5  # patterns took minutes
