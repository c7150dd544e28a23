"""What is a conversation and what is none."""

import re

import pytest
from transformers import AutoTokenizer

from internlm_mm.tokenizers import build_template
from internlm_mm.tokenizers.chat_messages import Call, Message, read_conversation
from tests.conversations import CALLING, NAMES, PLAIN, TOOLS, call

USER = {'role': 'user', 'content': 'Hi'}
ANSWER = {'role': 'assistant', 'content': 'Hello'}
CALLS = {'role': 'assistant', 'content': '', 'tool_calls': [call('f', {}, 'x'), call('g', {}, 'y')]}


def test_what_is_read():
    read = read_conversation(CALLING, TOOLS)
    assert read.uses_tools and [tool['function']['name'] for tool in read.tools] == [
        'python',
        'weather',
    ]
    assert read.messages[0] == Message('system', 'Be brief.')
    code = Call('python', {'code': 'print(6 * 7)'}, 'a')
    assert read.messages[2] == Message('assistant', 'I compute.', calls=(code,), loss=True)
    assert read.messages[3] == Message('tool', '42', 'python')  # as the call was named
    assert read.messages[4].content == ''
    assert not read_conversation(PLAIN).uses_tools
    assert read_conversation(CALLING).uses_tools


def test_arguments_may_be_json_and_contents_lists_of_texts():
    parts = [{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}]
    function = {'name': 'f', 'arguments': '{"x": [1, "é"]}'}
    read = read_conversation(
        [
            {'role': 'user', 'content': parts},
            {'role': 'assistant', 'content': None, 'tool_calls': [{'function': function}]},
            {'role': 'tool', 'content': 'r'},
            {'role': 'assistant', 'content': 'x', 'loss': False, 'refusal': None},
        ]
    )
    assert read.messages[0].content == 'ab'
    assert read.messages[1].calls == (Call('f', {'x': [1, 'é']}),)
    assert read.messages[2].name == 'f'
    assert [message.loss for message in read.messages] == [False, True, False, False]


def test_images_are_in_results_alone():
    image = {'type': 'image_url', 'image_url': {'url': 'data:image/png;base64,iVBORw0KGgo='}}
    call_f = {'role': 'assistant', 'tool_calls': [call('f', {}, 'x')]}
    result = {'role': 'tool', 'content': [{'type': 'text', 'text': 'a'}, image]}
    assert read_conversation([USER, call_f, result]).messages[2].content == 'a\n[image]'
    with pytest.raises(ValueError, match=r"message 0: content: .* in a tool's message alone"):
        read_conversation([{'role': 'user', 'content': [image]}])


@pytest.mark.parametrize('name', [n for n in NAMES if n != 'internlm'])
def test_contents_of_parts_and_images_of_functions(name, exported):
    hugging_face = AutoTokenizer.from_pretrained(exported[name])
    text = [{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': ' b '}]
    image = {'type': 'image_url', 'image_url': {'url': 'data:image/png;base64,iVBORw0KGgo='}}
    messages = [*CALLING[:1], {'role': 'user', 'content': text}, *CALLING[2:]]
    for results, spelt in (
        ([*text, image, image], 'a b \n[image]\n[image]'),
        ([image, *text], '[image]a b '),
        ([], ''),
    ):
        messages[3] = CALLING[3] | {'content': results}
        template = build_template(name)
        ours = template.text(messages, TOOLS)
        theirs = hugging_face.apply_chat_template(messages, tools=TOOLS, tokenize=False)
        assert theirs == hugging_face.bos_token + ours
        assert (spelt.strip() if template.strip else spelt) in ours and 'iVBOR' not in ours


def test_results_may_come_in_another_order():
    results = [
        {'role': 'tool', 'tool_call_id': 'y', 'content': '2'},
        {'role': 'tool', 'name': 'f', 'content': '1'},
    ]
    read = read_conversation([USER, CALLS, *results])
    assert [message.name for message in read.messages[2:]] == ['g', 'f']


def test_a_file_beside_a_question():
    read = read_conversation([USER, {'role': 'user', 'name': 'file', 'content': '[]'}, ANSWER])
    assert read.messages[1].name == 'file'


def answered(*results: dict) -> list[dict]:
    return [USER, CALLS, *({'role': 'tool', 'content': 'r', **result} for result in results)]


def with_function(**function) -> list[dict]:
    return [USER, {'role': 'assistant', 'tool_calls': [{'function': function}]}]


@pytest.mark.parametrize(
    ('messages', 'error'),
    [
        ([], 'messages: there is none'),
        ({'role': 'user'}, 'messages: a list of dicts, not dict'),
        (['Hi'], 'message 0: a dict with role and content, not str'),
        ([{'role': 'usr', 'content': ''}], "message 0: role 'usr' is none. Did you mean 'user'?"),
        ([{'content': 'x'}], 'message 0: role None is none.'),
        ([{'role': 'user'}], 'message 0: content is missing'),
        ([{'role': 'user', 'content': 3}], 'message 0: content: a text, not int'),
        ([{'role': 'user', 'content': [{'type': 'image_url'}]}], 'message 0: content: of parts'),
        (
            [{'role': 'user', 'content': 'x', 'contnt': 'y'}],
            "message 0: field 'contnt' is none of a message of 'user'. Did you mean 'content'?",
        ),
        ([{'role': 'user', 'content': 'x', 'name': 'a b'}], "message 0: name 'a b'"),
        ([USER, ANSWER | {'function_call': {'name': 'f'}}], "field 'function_call' is none of a"),
        ([USER | {'loss': True}], 'message 0: loss True: True or False, and True for an assistant'),
        ([USER, ANSWER | {'loss': 'no'}], "message 1: loss 'no'"),
        ([ANSWER], "message 0: role 'assistant' at the beginning; system or user may come"),
        ([USER, USER], "message 1: role 'user' after 'user'; assistant may come"),
        ([USER, ANSWER, ANSWER], "message 2: role 'assistant' after 'assistant'; user may come"),
        ([USER, ANSWER, {'role': 'system', 'content': ''}], "message 2: role 'system' after"),
        ([USER, {'role': 'tool', 'content': ''}], "message 1: role 'tool', but no call waits"),
        (answered({'tool_call_id': 'z'}), "message 2: tool_call_id 'z' is of no call that waits"),
        (answered({'name': 'h'}), "message 2: name 'h' is of no call that waits for a result"),
        (answered({}), 'message 2: tool_call_id is missing, and several calls wait'),
        ([*answered({'name': 'f'}), USER], "message 3: role 'user', but there is no result yet"),
        ([*answered({'name': 'f'}, {'name': 'f'})], "message 3: name 'f' is of no call"),
        (with_function(name='f x'), "message 1: tool_calls[0].function.name 'f x'"),
        (with_function(name='f', arguments='{'), 'message 1: tool_calls[0].function.arguments: no'),
        (with_function(name='f', arguments=[1]), 'arguments: an object, not list'),
        (with_function(name='python', arguments={'c': ''}), "'python' takes a text 'code'"),
        ([USER, ANSWER | {'tool_calls': 'f'}], 'message 1: tool_calls: a list of dicts, not str'),
        ([USER, ANSWER | {'tool_calls': ['f']}], "tool_calls[0]: a dict with 'function'"),
        ([USER, ANSWER | {'reasoning_content': 3}], 'reasoning_content: a text, not int'),
    ],
)
def test_what_is_none(messages, error):
    with pytest.raises(ValueError, match=f'^record 17, .*{re.escape(error)}'):
        read_conversation(messages, where='record 17')


@pytest.mark.parametrize(
    ('tool', 'error'),
    [
        ({'name': 'f'}, "x, tools[1]: {'type': 'function', 'function': {...}}, not"),
        ({'function': {'name': 'f g'}}, "x, tools[1].function.name 'f g'"),
        ({'function': {'name': 'f', 'description': 1}}, 'x, tools[1].function.description: a text'),
    ],
)
def test_tools_that_are_none(tool, error):
    with pytest.raises(ValueError, match=f'^{re.escape(error)}'):
        read_conversation([USER], [*TOOLS[:1], tool], 'x')
