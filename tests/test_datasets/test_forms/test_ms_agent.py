"""A sample as MSAgent-Bench has them."""

import json

import pytest

from internlm_mm.datasets.conversation_formats import detect_format
from internlm_mm.datasets.converting import convert_record
from internlm_mm.datasets.forms.ms_agent import read, write

PLUGIN = {
    'plugin_name': 'modelscope_text-ie',
    'plugin_owner': 'ModelScopeGPT',
    'plugin_type': 'default',
    'plugin_schema_for_model': {
        'name': 'modelscope_text-ie',
        'description': '针对中文的文本, 根据schema要抽取的内容',
        'url': 'http://127.0.0.1:5873/uie',
        'paths': [
            {
                'name': 'modelscope_text-ie',
                'method': 'post',
                'parameters': [
                    {'name': 'text', 'description': '用户输入的文本', 'required': 'True'},
                    {'name': 'schema', 'description': '表示法', 'required': 'False'},
                ],
            }
        ],
    },
}
SYSTEM = '你是达摩院的ModelScopeGPT（魔搭助手），你是个大语言模型。'
LIST = '当前对话可以使用的插件信息如下，请自行判断是否需要调用插件来解决当前用户问题：\n\n'
CALL = (
    '<|startofthink|>```JSON\n{"api_name": "modelscope_text-ie", '
    '"url": "http://127.0.0.1:5873/uie", '
    '"parameters": {"text": "近日", "schema": "{\\"人物\\": null}"}}\n```<|endofthink|>'
)
RESULT = '\n\n<|startofexec|>```JSON\n{"人物": []}\n```<|endofexec|>\n'
SAMPLE = {
    'id': 'MS_Agent_Bench_20',
    'conversations': [
        {'from': 'system', 'value': f'{SYSTEM}{LIST}1. {json.dumps(PLUGIN)}'},
        {'from': 'user', 'value': '抽取：近日'},
        {'from': 'assistant', 'value': f'好的。{CALL}{RESULT}信息抽取结果：没有。'},
        {'from': 'user', 'value': '谢谢'},
        {'from': 'assistant', 'value': '不客气'},
    ],
}


def test_read():
    messages, tools = read(SAMPLE)
    arguments = {'text': '近日', 'schema': '{"人物": null}'}
    call = {'name': 'modelscope_text-ie', 'arguments': arguments}
    assert messages == [
        {'role': 'system', 'content': SYSTEM},
        {'role': 'user', 'content': '抽取：近日'},
        {
            'role': 'assistant',
            'content': '好的。',
            'tool_calls': [{'type': 'function', 'function': call}],
        },
        {'role': 'tool', 'content': '{"人物": []}'},
        {'role': 'assistant', 'content': '信息抽取结果：没有。'},
        {'role': 'user', 'content': '谢谢'},
        {'role': 'assistant', 'content': '不客气'},
    ]
    [tool] = tools
    assert tool['function']['name'] == 'modelscope_text-ie'
    assert tool['function']['parameters'] == {
        'type': 'object',
        'properties': {
            'text': {'type': 'string', 'description': '用户输入的文本'},
            'schema': {'type': 'string', 'description': '表示法'},
        },
        'required': ['text'],
    }
    assert detect_format(SAMPLE) == 'ms_agent'


def test_conversations_as_text():
    for spell in (json.dumps, repr):  # JSON, and as Python writes a list
        record = {'id': 'x', 'conversations': spell(SAMPLE['conversations'])}
        assert detect_format(record) == 'ms_agent'
        assert read(record) == read(SAMPLE)


def test_several_calls_in_one_text():
    text = CALL + RESULT + '再来：' + CALL + RESULT + '完'
    record = {
        'conversations': [{'from': 'user', 'value': 'q'}, {'from': 'assistant', 'value': text}]
    }
    messages = read(record)[0]
    assert [m['role'] for m in messages] == ['user', *['assistant', 'tool'] * 2, 'assistant']
    assert [m['content'] for m in messages[1::2]] == ['', '再来：', '完']
    assert read(write(messages, [])) == (messages, [])


def test_nothing_is_lost():
    """Not even a plugin's address and the wording of the system's text."""
    converted = convert_record(SAMPLE, 'ms_agent')
    assert 'url' not in json.dumps(converted['messages'])
    assert convert_record(converted, 'messages', 'ms_agent') == SAMPLE
    del converted['source']
    again = convert_record(converted, 'messages', 'ms_agent')
    assert read(again)[0] == read(SAMPLE)[0]


@pytest.mark.parametrize(
    ('text', 'error'),
    [
        (CALL + '答', 'value: a call .* without its result'),
        (CALL + CALL, 'value: a call .* without its result'),
        (RESULT, 'a result .* that follows no call'),
        (CALL.replace('"api_name"', '"api"'), 'an object with api_name'),
        (CALL.replace('{', '['), 'startofthink: neither JSON'),
    ],
)
def test_malformed(text, error):
    with pytest.raises(ValueError, match=error):
        read({'conversations': [{'from': 'assistant', 'value': text}]})


def test_a_call_may_end_a_conversation():
    messages = read({'conversations': [{'from': 'assistant', 'value': CALL}]})[0]
    assert len(messages) == 1 and messages[0]['tool_calls']
