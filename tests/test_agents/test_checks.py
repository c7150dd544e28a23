"""Each fault is planted in a conversation that has none."""

import copy

import pytest

from internlm_mm.agents.checks import check_conversation, check_documents, check_record
from internlm_mm.datasets.conversation_encoding import ConversationEncoder
from internlm_mm.datasets.conversation_formats import Example
from internlm_mm.tokenizers import build_template, load_tokenizer
from internlm_mm.tokenizers.chat_spelling import Encoded
from tests.conversations import CALLING, NAMES, PLAIN, TOOLS, WEATHER, call

WITH_TOOLS = [name for name in NAMES if name not in ('internlm', 'internlm3')]
SCHEMA = {
    'type': 'object',
    'properties': {'city': {'type': 'string'}, 'days': {'type': 'array'}},
    'required': ['city'],
    'additionalProperties': False,
}
FULL = [TOOLS[0], {'type': 'function', 'function': WEATHER['function'] | {'parameters': SCHEMA}}]


@pytest.fixture(scope='module')
def check(exported):
    tokenizers = {name: load_tokenizer(exported[name]) for name in WITH_TOOLS}

    def run(messages, tools=FULL, name='internlm2'):
        return check_conversation(messages, tools, build_template(name), tokenizers[name])

    return run


@pytest.mark.parametrize('name', WITH_TOOLS)
def test_good_conversations(name, check):
    assert check(CALLING, FULL, name) == []
    assert check(CALLING, None, name) == []
    assert check(PLAIN, None, name) == []
    context = [*CALLING[:-1], CALLING[-1] | {'loss': False}]
    assert check(context, FULL, name) == []


def changed(index: int, **function) -> list[dict]:
    messages = copy.deepcopy(CALLING)
    messages[index]['tool_calls'][0]['function'] |= function
    return messages


PLANTED = [
    (changed(4, name='wether'), FULL, "message 4, tool_calls[0]: there is no tool 'wether'. Did you mean 'weather'?"),  # noqa: E501
    (changed(4, arguments={}), FULL, "message 4, tool_calls[0].function.arguments of 'weather': 'city' is a required"),  # noqa: E501
    (changed(4, arguments={'city': 3}), FULL, "['city']: 3 is not of type 'string'"),
    (changed(4, arguments={'city': 'x', 'y': 1}), FULL, "'y' was unexpected"),
    (changed(4, arguments='{"city": '), FULL, 'tool_calls[0].function.arguments: no JSON'),
    ([*CALLING[:3], CALLING[-1]], FULL, "message 3: role 'assistant', but there is no result yet"),
    (CALLING, [*FULL, FULL[1]], "tools[2]: 'weather' is declared twice"),
    (CALLING, [{'function': {'name': 'weather', 'parameters': {'type': 'objekt'}}}], "tools[0].function.parameters: no JSON Schema"),  # noqa: E501
    (CALLING, [{'function': {'name': 'weather', 'parameters': [1]}}], 'parameters: an object, not list'),  # noqa: E501
]  # fmt: skip


@pytest.mark.parametrize(('messages', 'tools', 'problem'), PLANTED)
def test_planted_faults(messages, tools, problem, check):
    found = check(messages, tools)
    assert any(problem in line for line in found), found


@pytest.mark.parametrize('wrong', [{'name': 'wether'}, {'arguments': {'city': 3}}])
def test_what_is_not_learned_may_be_wrong(wrong, check):
    messages = changed(4, **wrong)
    assert check(messages)
    messages[4]['loss'] = False
    assert check(messages) == []
    malformed = {'role': 'assistant', 'content': '<tool_call>\n{"name"', 'loss': False}
    told = {'role': 'user', 'content': 'The call could not be read.'}
    for name in WITH_TOOLS:
        assert check([CALLING[1], malformed, told, CALLING[-1]], FULL, name) == []
    assert check([CALLING[1], malformed | {'loss': True}], FULL, 'chatml')


def test_several_calls_where_one_is_spelt(check):
    calls = [call('weather', {'city': c}, c) for c in 'ab']
    messages = [CALLING[1], {'role': 'assistant', 'content': None, 'tool_calls': calls}]
    assert check(messages) == []
    assert check(messages, name='internlm_v1_1') == [
        "message 1: 2 calls in a turn; 'internlm_v1_1' spells one"
    ]


@pytest.mark.parametrize(
    ('name', 'text'),
    [
        ('chatml', 'As in <tool_call>\n{}\n</tool_call>'),
        ('internlm_v1_1', 'first\nAction:f\nActionInput:{}'),
        ('llama3', '{"name": "weather", "parameters": {}}'),
    ],
)
def test_text_that_reads_as_a_call(name, text, check):
    """Where no token tells them apart; InternLM2 has some."""
    messages = copy.deepcopy(CALLING)
    messages[2]['content'] = text
    [problem] = check(messages, FULL, name)
    assert problem.startswith('message 2: the answer cannot be told from a call')
    assert check(messages, FULL, 'internlm2') == []


def encoded(exported, name: str, max_tokens: int = 10_000, vocabulary: str = '') -> tuple:
    template, tokenizer = build_template(name), load_tokenizer(exported[vocabulary or name])
    encoder = ConversationEncoder(tokenizer, template, max_tokens, 'truncate')
    return encoder(Example(CALLING, FULL, 'here', 'messages')).documents, template, tokenizer


@pytest.mark.parametrize(
    ('name', 'vocabulary'),
    [*((name, name) for name in WITH_TOOLS), ('internlm_v1_1', 'chatml')],  # the last: as text
)
def test_documents_that_are_cut(name, vocabulary, exported):
    documents, template, tokenizer = encoded(exported, name, vocabulary=vocabulary)
    assert bool(template.stops(tokenizer)[0]) == (name == vocabulary)
    assert check_documents(documents, template, tokenizer) == []
    mask = documents[0].loss_mask
    start = mask.index(True)
    stop = mask.index(False, start)
    for length, words in ((stop - 2, 'inside a call'), (start + 1, 'inside an answer')):
        cut, _, _ = encoded(exported, name, length, vocabulary)
        [problem] = check_documents(cut, template, tokenizer)
        assert problem == f'document 0, tokens {start}:{length}: it is cut off {words}'


def test_a_record_and_what_became_of_it(exported):
    whole, template, tokenizer = encoded(exported, 'internlm2')
    documents, _, _ = encoded(exported, 'internlm2', whole[0].loss_mask.index(True) + 2)
    wrong = changed(4, name='wether')
    assert check_record(CALLING, FULL, (), template, tokenizer) == []
    assert check_record(CALLING, FULL, documents, template, tokenizer) == check_documents(
        documents, template, tokenizer
    )
    assert check_record(wrong, FULL, documents, template, tokenizer) == check_conversation(
        wrong, FULL, template, tokenizer
    )
    assert check_documents(documents, template, tokenizer)


def test_stops_without_a_loss_and_wrong_ids(exported):
    documents, template, tokenizer = encoded(exported, 'internlm_v1_1')
    stop = tokenizer.token_id('<eoa>')
    [document] = documents
    silent = [m and i != stop for i, m in zip(*document, strict=True)]
    problems = check_documents([Encoded(document.ids, silent)], template, tokenizer)
    assert len(problems) == 4  # behind the last <eoa> follow a line's end and </s>
    assert all('ends without a stop token that is learned' in line for line in problems[:3])
    other = tokenizer.token_id('<TOKENS_UNUSED_3>')  # as InternLM's own tool had it
    wrong = [other if index == stop else index for index in document.ids]
    problems = check_documents([Encoded(wrong, document.loss_mask)], template, tokenizer)
    assert len(problems) == 3
