"""Samples as Agent-FLAN's files have them."""

import pytest

from internlm_mm.datasets.conversation_formats import detect_format
from internlm_mm.datasets.converting import convert_record
from internlm_mm.datasets.forms.agent_flan import read


def turn(role: str, content: str, loss: bool = False) -> dict:
    return {'role': role, 'content': content, 'loss': loss}


STEP = 'Thought: I look it up.\nAction: search\nAction Input: {"query": "Paris"}'
SAMPLE = {
    'conversation': [
        turn('system', 'You have these tools:\nsearch: looks up'),
        turn('user', 'Where is Paris?'),
        turn('assistant', STEP, True),
        turn('user', '{"found": "France"}'),
        turn('assistant', 'In France.', False),
        turn('user', 'Sure?'),
        turn('assistant', 'Thought: now\nAction: bash\n```bash\nls\n```', True),
    ],
    'id': 'agent_instruct_react_3',
}


def test_read():
    messages, tools = read(SAMPLE)
    call = {'name': 'search', 'arguments': {'query': 'Paris'}}
    assert tools == [] and messages == [
        {'role': 'system', 'content': 'You have these tools:\nsearch: looks up'},
        {'role': 'user', 'content': 'Where is Paris?'},
        {
            'role': 'assistant',
            'content': 'I look it up.',
            'tool_calls': [{'type': 'function', 'function': call}],
        },
        {'role': 'tool', 'content': '{"found": "France"}'},
        {'role': 'assistant', 'content': 'In France.', 'loss': False},
        {'role': 'user', 'content': 'Sure?'},
        {'role': 'assistant', 'content': SAMPLE['conversation'][-1]['content']},
    ]
    assert detect_format(SAMPLE) == 'agent_flan'


def test_nothing_is_lost():
    converted = convert_record(SAMPLE, 'agent_flan')
    assert 'source' not in converted and converted['id'] == SAMPLE['id']
    assert convert_record(converted, 'messages', 'agent_flan') == SAMPLE


def test_other_spellings_come_back_too():
    loose = SAMPLE['conversation'][2] | {'content': STEP.replace('{"query"', '{\n"query"')}
    record = {'conversation': [*SAMPLE['conversation'][:2], loose]}
    converted = convert_record(record, 'agent_flan')
    assert converted['messages'] == read(SAMPLE)[0][:3] and 'source' in converted
    assert convert_record(converted, 'messages', 'agent_flan') == record


def test_input_that_is_no_json_stays_text():
    text = 'Thought: t\nAction: f\nAction Input: {unquoted}'
    messages = read({'conversation': [turn('user', 'q'), turn('assistant', text, True)]})[0]
    assert messages[1] == {'role': 'assistant', 'content': text}


@pytest.mark.parametrize(
    ('record', 'error'),
    [
        ({'conversation': 'x'}, 'conversation: a list, not str'),
        ({'conversation': ['x']}, r'conversation\[0\]: an object with role and content, not str'),
        ({'conversation': [turn('usr', 'x')]}, r"\[0\].role 'usr' is none. Did you mean 'user'?"),
        (
            {'conversation': [{'role': 'user'}]},
            r'conversation\[0\].content: a text, not null or missing',
        ),
    ],
)
def test_malformed(record, error):
    with pytest.raises(ValueError, match=error):
        read(record)


def test_functions_have_no_place():
    record = {'messages': read(SAMPLE)[0], 'tools': [{'name': 'f'}]}
    with pytest.raises(ValueError, match='tools: this form has no place'):
        convert_record(record, 'messages', 'agent_flan')
