"""Traces as Lagent 0.5 stores an agent's memory."""

import pytest

from internlm_mm.datasets.conversation_formats import detect_format
from internlm_mm.datasets.converting import convert_record
from internlm_mm.datasets.forms.lagent import read


def said(sender: str, content: object, formatted: object = None) -> dict:
    """As `AgentMessage.model_dump()` gives it."""
    return {
        'content': content,
        'sender': sender,
        'formatted': formatted,
        'extra_info': None,
        'type': None,
        'receiver': None,
        'stream_state': 0,
    }


def parsed(thought: str, tool_type: str | None = None, action: object = None) -> dict:
    status = int(action is not None)
    return {'tool_type': tool_type, 'thought': thought, 'action': action, 'status': status}


PLUGIN = {'name': 'Weather.today', 'parameters': {'city': 'Shanghai'}}
RESULT = {'type': 'text', 'content': '{"temp_c": 21}'}
SAMPLE = {
    'memory': [
        said('user', 'What is 20!, and the weather?'),
        said('Agent', 'I<|action_start|>', parsed('I compute.', 'interpreter', 'print(1)')),
        said('ActionExecutor', '2432902008176640000'),
        said('Agent', '...', parsed('', 'plugin', PLUGIN)),
        said('ActionExecutor', [RESULT, {'type': 'image', 'content': 'a.png'}]),
        said('Agent', 'It is 21C.', parsed('It is 21C.')),
    ],
    'tools': [{'type': 'function', 'function': {'name': 'Weather.today'}}],
}  # fmt: skip


def called(name: str, arguments: dict) -> list[dict]:
    return [{'type': 'function', 'function': {'name': name, 'arguments': arguments}}]


def test_read():
    messages, tools = read(SAMPLE)
    assert tools == SAMPLE['tools']
    assert messages == [
        {'role': 'user', 'content': 'What is 20!, and the weather?'},
        {
            'role': 'assistant',
            'content': 'I compute.',
            'tool_calls': called('python', {'code': 'print(1)'}),
        },
        {'role': 'tool', 'content': '2432902008176640000'},
        {
            'role': 'assistant',
            'content': '',
            'tool_calls': called('Weather.today', {'city': 'Shanghai'}),
        },
        {'role': 'tool', 'content': '{"temp_c": 21}\n[image](a.png)'},
        {'role': 'assistant', 'content': 'It is 21C.'},
    ]
    assert detect_format(SAMPLE) == 'lagent'


def test_code_after_the_hook_that_wraps_it():
    action = {'name': 'IPythonInterpreter.run', 'parameters': {'command': '1'}}
    memory = [said('user', 'q'), said('Agent', 'x', parsed('t', 'interpreter', action))]
    assert read({'memory': memory})[0][1]['tool_calls'] == called('python', {'code': '1'})


def test_nothing_is_lost():
    converted = convert_record(SAMPLE, 'lagent')
    assert convert_record(converted, 'messages', 'lagent') == SAMPLE
    del converted['source']
    again = convert_record(converted, 'messages', 'lagent')
    assert read(again) == read(SAMPLE) and 'source' not in convert_record(again, 'lagent')


@pytest.mark.parametrize(
    ('memory', 'error'),
    [
        ([3], r'memory\[0\]: an object with sender and content, not int'),
        ([said('user', None)], r'memory\[0\].content: a text, not null or missing'),
        ([said('Agent', '', parsed('', 'shell', 'ls'))], r"tool_type 'shell': 'plugin'"),
        ([said('Agent', '', parsed('', 'plugin', {'x': 1}))], 'action: code, or an object'),
    ],
)  # fmt: skip
def test_malformed(memory, error):
    with pytest.raises(ValueError, match=error):
        read({'memory': memory})
