"""ShareGPT's form with function_call; tests of reading it are in test_conversation_formats.py."""

import json

import pytest

from internlm_mm.datasets.converting import convert_record
from internlm_mm.datasets.forms.sharegpt import read, write

TOOL = {'type': 'function', 'function': {'name': 'random', 'description': '随机数'}}
SAMPLE = {
    'system': 'Be brief.',
    'conversations': [
        {'from': 'human', 'value': '你好，1到100？'},
        {'from': 'function_call', 'value': '{"name": "random", "arguments": {"max": 100}}'},
        {'from': 'observation', 'value': '57'},
        {'from': 'gpt', 'value': '是57。', 'loss': False},
        {'from': 'human', 'value': 'Two?'},
        {
            'from': 'function_call',
            'value': '[{"name": "random", "arguments": {}}, {"name": "random", "arguments": {}}]',
        },
    ],
    'tools': json.dumps([TOOL], ensure_ascii=False),
}


def test_both_ways():
    messages, tools = read(SAMPLE)
    assert tools == [TOOL] and messages[4]['loss'] is False
    assert len(messages[6]['tool_calls']) == 2
    assert write(messages, tools) == SAMPLE
    assert convert_record(convert_record(SAMPLE, 'sharegpt'), 'messages', 'sharegpt') == SAMPLE


def test_text_beside_calls_has_no_place():
    messages, tools = read(SAMPLE)
    messages[2]['content'] = 'I draw.'
    with pytest.raises(ValueError, match='message 2: this form has no place for text beside calls'):
        write(messages, tools)
