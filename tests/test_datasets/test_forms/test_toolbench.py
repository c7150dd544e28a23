"""A sample as toolllama_G123_dfs_train.json has them."""

import pytest

from internlm_mm.datasets.conversation_formats import FORMATS, detect_format
from internlm_mm.datasets.converting import convert_record
from internlm_mm.datasets.forms.toolbench import read, write

API = {
    'name': 'get_weather_for_open_weather',
    'description': 'This is the subfunction for tool "open_weather", it\'s for the weather',
    'parameters': {
        'type': 'object',
        'properties': {'city': {'type': 'string', 'description': '', 'example_value': 'Paris'}},
        'required': ['city'],
        'optional': [],
    },
}
PREAMBLE = (
    'You are AutoGPT, you can use many tools(functions) to do the following task.\n'
    "Let's Begin!\nTask description: You should use functions to help handle the real time user "
    'querys. Remember:\n1.ALWAYS call "Finish" function at the end of the task.\n'
    'You have access of the following tools:\n1.open_weather: weather\n'
)
SAMPLE = {
    'id': 'Step 5: What is the weather in Paris?',
    'conversations': [
        {
            'from': 'system',
            'value': f'{PREAMBLE}\nSpecifically, you have access to the following APIs: '
            + str([API]),
        },
        {'from': 'user', 'value': '\nWhat is the weather in Paris?\nBegin!\n'},
        {
            'from': 'assistant',
            'value': '\nThought: I ask for it.\nAction: get_weather_for_open_weather\n'
            'Action Input: {"city": "Paris"}',
        },
        {'from': 'function', 'value': '{"error": "", "response": "{\'temp\': 18}"}'},
        {
            'from': 'assistant',
            'value': '\nThought: \nAction: Finish\nAction Input: {"return_type": "give_answer", '
            '"final_answer": "18 degrees,\\nand dry."}',
        },
    ],
}


def test_read():
    messages, tools = read(SAMPLE)
    assert tools == [{'type': 'function', 'function': API}]
    assert [message['role'] for message in messages] == [
        'system', 'user', 'assistant', 'tool', 'assistant']  # fmt: skip
    assert messages[0]['content'] == PREAMBLE.rstrip('\n')
    assert messages[1]['content'] == 'What is the weather in Paris?'
    assert messages[2]['content'] == 'I ask for it.'
    function = {'name': 'get_weather_for_open_weather', 'arguments': {'city': 'Paris'}}
    assert messages[2]['tool_calls'] == [{'type': 'function', 'function': function}]
    assert messages[3]['content'] == SAMPLE['conversations'][3]['value']
    finish = messages[4]['tool_calls'][0]['function']
    assert finish['name'] == 'Finish'
    assert finish['arguments']['final_answer'] == '18 degrees,\nand dry.'
    assert detect_format(SAMPLE) == 'toolbench' and FORMATS['toolbench'] is read


def test_columns_and_other_spellings():
    turns = SAMPLE['conversations']
    columns = {key: [turn[key] for turn in turns] for key in ('from', 'value')}
    assert read({'conversations': columns}) == read(SAMPLE)
    indented = '\n Thought: I ask for it.\nAction: get_weather_for_open_weather\nAction Input: {\n  "city": "Paris"\n}'  # noqa: E501
    other = [*turns[:2], {'from': 'assistant', 'value': indented}, *turns[3:]]
    assert read({'conversations': other}) == read(SAMPLE)
    text = [*turns[:2], {'from': 'assistant', 'value': 'I give up and restart.'}]
    assert read({'conversations': text})[0][-1]['content'] == 'I give up and restart.'
    empty = [*turns[:2], {'from': 'assistant', 'value': 'Thought: t\nAction: f\nAction Input:'}]
    assert read({'conversations': empty})[0][-1]['tool_calls'][0]['function']['arguments'] == {}


def test_nothing_is_lost():
    converted = convert_record(SAMPLE, 'toolbench')
    assert converted['id'] == SAMPLE['id']
    assert convert_record(converted, 'messages', 'toolbench') == SAMPLE
    messages, tools = read(SAMPLE)
    assert read(write(messages[1:], tools))[1] == tools


def turn(speaker: str, value: str) -> dict:
    return {'conversations': [{'from': speaker, 'value': value}]}


@pytest.mark.parametrize(
    ('record', 'error'),
    [
        (turn('assistent', 'x'), r"\[0\].from 'assistent' is none. Did you mean 'assis"),
        (turn('system', 'you have access to the following APIs: [open("x")]'), 'neither JSON'),
        (turn('system', 'you have access to the following APIs: {"name": "f"}'), 'APIs: a list'),
        (turn('assistant', 'Thought: t\nAction: f\nAction Input: {"a": '), 'value, Action In'),
        (turn('assistant', 'Thought: t\nAction: f\nAction Input: [1]'), 'an object, not list'),
        ({'conversations': {'from': ['user'], 'value': []}}, 'of different lengths'),
        ({'conversations': [1]}, r'conversations\[0\]: an object with from and value, not int'),
    ],
)  # fmt: skip
def test_malformed(record, error):
    with pytest.raises(ValueError, match=error):
        read(record)


def test_what_has_no_place():
    call = {'type': 'function', 'function': {'name': 'f', 'arguments': {}}}
    with pytest.raises(ValueError, match='message 1: this form has one call a turn, not 2'):
        write([{'role': 'user', 'content': 'q'},
               {'role': 'assistant', 'content': '', 'tool_calls': [call, call]}], [])  # fmt: skip
