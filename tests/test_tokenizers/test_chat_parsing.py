"""What models write is read back: what the templates spell, what is near it, and what is broken."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from internlm_mm.tokenizers import build_template, load_tokenizer
from internlm_mm.tokenizers.chat_messages import Call, read_conversation
from internlm_mm.tokenizers.chat_parsing import Answer, read_answer, read_answer_ids
from tests.conversations import CALLING, NAMES, TOOLS, call, texts

WITH_TOOLS = [name for name in NAMES if name != 'internlm']
QUESTION = {'role': 'user', 'content': 'Q'}
# What begins a call or an answer where that is no token: such text cannot be told from it.
WORDS = {
    'internlm_v1_1': ('Thought:', 'Action', 'Final'),
    'chatml': ('<tool_call>',),
    'llama3': ('{"name"',),
}


def said(template, message: dict) -> str:
    """What the model wrote of a message, by the segments that are its own."""
    segments = template.segments([QUESTION, message], TOOLS)
    return ''.join(segment.text for segment in segments if segment.answer)


def as_answer(message: dict) -> Answer:
    read = read_conversation([QUESTION, message]).messages[1]
    calls = tuple(Call(one.name, one.arguments) for one in read.calls)
    return Answer(read.content, calls, read.thought)


def values() -> some.SearchStrategy:
    text = some.text(some.characters(exclude_categories=['Cs']), max_size=6)
    number = some.one_of(
        some.integers(-(10**9), 10**9), some.floats(allow_nan=False, allow_infinity=False)
    )
    plain = some.one_of(some.none(), some.booleans(), number, text)
    return some.recursive(
        plain,
        lambda inner: some.one_of(
            some.lists(inner, max_size=3), some.dictionaries(text, inner, max_size=3)
        ),
        max_leaves=6,
    )


def unmarked(text: str, words: Sequence[str]) -> str:
    """A text without those words."""
    while any(word in text for word in words):
        for word in words:
            text = text.replace(word, '')
    return text


def messages(template, words: Sequence[str]) -> some.SearchStrategy[dict]:
    """An assistant's messages, with all that may be in one but the words."""
    text = texts(template).map(lambda text: unmarked(text, words))
    name = some.from_regex(r'[\w.\-]{1,8}', fullmatch=True).filter(
        lambda name: name not in ('python', 'PythonInterpreter')
    )
    arguments = some.dictionaries(text, some.one_of(text, values()), max_size=3)
    plugin = some.builds(lambda name, arguments: call(name, arguments, 'x'), name, arguments)
    code = some.builds(lambda code: call('python', {'code': code}, 'x'), text)
    limit = 3 if template.tools.parallel else 1
    calls = some.lists(some.one_of(plugin, code), max_size=limit)

    def message(content: str, calls: list[dict], thought: str) -> dict:
        content = content.strip() if template.strip else content
        if calls and thought:  # a lone thought before a call is its content
            content = content or 'c'
        made = {'role': 'assistant', 'content': content}
        made |= {'tool_calls': calls} if calls else {}
        return made | ({'reasoning_content': thought} if thought else {})

    thought = text if template.tools.thought else some.just('')
    return some.builds(message, text, calls, thought)


@pytest.mark.parametrize('name', WITH_TOOLS)
@settings(max_examples=40, deadline=None)
@given(data=some.data())
def test_what_is_spelt_is_read(name, data):
    template = build_template(name)
    words = (*WORDS.get(name, ()), *template.marks)  # tokens tell these apart: below
    message = data.draw(messages(template, words))
    written = said(template, message)
    assert read_answer(template, written) == as_answer(message)
    for mark in template.stop:
        assert read_answer(template, written.removesuffix(mark)) == as_answer(message)


@pytest.mark.parametrize('name', [n for n in WITH_TOOLS if n != 'internlm3'])
@settings(max_examples=15, deadline=None)
@given(data=some.data())
def test_tokens_tell_marks_from_their_spelling(
    name, data, exported, internlm_vocabulary, byte_vocabulary
):
    """Whatever contents, arguments and code spell, no mark of theirs is one."""
    template = build_template(name)
    message = data.draw(messages(template, WORDS.get(name, ())))
    own = internlm_vocabulary if name.startswith('internlm') else byte_vocabulary
    for tokenizer in (load_tokenizer(exported[name]), own):
        encoded = template.encode(tokenizer, [QUESTION, message], TOOLS)
        start = encoded.loss_mask.index(True) if any(encoded.loss_mask) else len(encoded.ids)
        ids = encoded.ids[start:]
        assert read_answer_ids(template, tokenizer, ids) == as_answer(message)


@pytest.mark.parametrize('name', WITH_TOOLS)
def test_conversations(name):
    template = build_template(name)
    segments = template.segments(CALLING, TOOLS)
    answers = [m for m in CALLING if m['role'] == 'assistant']
    written, inside = [], False
    for segment in segments:
        if segment.answer and not inside:
            written.append('')
        if segment.answer:
            written[-1] += segment.text
        inside = segment.answer
    assert [read_answer(template, text) for text in written] == list(map(as_answer, answers))


def test_messages_in_openais_form():
    template = build_template('chatml')
    text = said(template, {'role': 'assistant', 'content': '', 'tool_calls': [
        call('f', {'x': 1}, 'a'), call('g', {}, 'b')]})  # fmt: skip
    message = read_answer(template, text).message(first=3)
    assert message == {'role': 'assistant', 'content': '', 'tool_calls': [
        call('f', {'x': 1}, 'call_3'), call('g', {}, 'call_4')]}  # fmt: skip
    assert said(template, message) == text
    steps = build_template('internlm_v1_1')
    message = read_answer(steps, 'Thought:so\nFinalAnswer:42').message()
    assert message == {'role': 'assistant', 'content': '42', 'reasoning_content': 'so'}


def test_without_functions_everything_is_content():
    for name in NAMES:
        template = build_template(name)
        text = 'Thought:a\nAction:f\nActionInput:{}<tool_call>'
        assert read_answer(template, text + template.stop[0], uses_tools=False) == Answer(text)


F = Call('f', {'x': 1})
NEAR = [
    ('internlm2', 'a<|action_start|><|plugin|>{"name": "f", "parameters": {"x": 1}}', 'a', F),
    ('internlm2', '<|action_start|> <|plugin|>\n{"parameters": {"x":1}, "name":"f"}\n<|action_end|>\n<|im_end|>', '', F),  # noqa: E501
    ('internlm2', '<|action_start|><|plugin|>\n{"name": "f", "arguments": "{\\"x\\": 1}"}', '', F),
    ('internlm2', '<|action_start|><|interpreter|>```py\n1\n```\n<|action_end|>', '', '1'),
    ('internlm2', '<|action_start|><|interpreter|>\nprint(1)\n<|action_end|>', '', 'print(1)'),
    ('internlm2', '<|action_start|><|interpreter|>\n{"code": "1"}<|action_end|>', '', '1'),
    ('internlm_v1_1', 'Thought:t\nAction: f\nAction Input: {"x": 1}', 't', F),
    ('internlm_v1_1', 'Action:PythonInterpreter\nActionInput:\n```python\nprint(1)\n```\n', '', 'print(1)'),  # noqa: E501
    ('internlm_v1_1', 'Action: PythonInterpreter\nAction Input: {"code": "1"}', '', '1'),
    ('chatml', 'a\n<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>\n', 'a', F),
    ('llama3', '{"name": "f", "parameters": {"x": 1}}', '', F),
]  # fmt: skip


@pytest.mark.parametrize(('name', 'text', 'content', 'expected'), NEAR)
def test_what_is_near_enough(name, text, content, expected):
    one = expected if isinstance(expected, Call) else Call('python', {'code': expected})
    assert read_answer(build_template(name), text) == Answer(content, (one,))


def test_answers_with_a_blank():
    template = build_template('internlm_v1_1')
    assert read_answer(template, 'Thought:t\nFinal Answer: 42') == Answer('42', thought='t')
    assert read_answer(template, 'No form at all.') == Answer('No form at all.')


P = '<|action_start|><|plugin|>\n'
BROKEN = [
    ('internlm2', P + '{"name": "f", "parameters": {"x": 1', 'truncated', 'ends before its JSON'),
    ('internlm2', P + '{"name": "f", "parameters": {"x": ', 'truncated', 'ends before its JSON'),
    ('internlm2', P, 'truncated', 'ends before its JSON'),
    ('internlm2', P + '{"name": "f", "parameters": {x: 1}}<|action_end|>', 'json', 'Expecting property name enclosed in double quotes at character 29 of'),  # noqa: E501
    ('internlm2', P + '{"name": "f", "parameters": {"x": NaN}}<|action_end|>', 'json', 'NaN is none'),  # noqa: E501
    ('internlm2', P + '{"name": "f", "parameters": {"x": 1e999}}<|action_end|>', 'json', '1e999 is too large'),  # noqa: E501
    ('internlm2', P + '{"name": "f", "parameters": {"x": ' + '[' * 99_999 + '<|action_end|>', 'json', 'nested too deep'),  # noqa: E501
    ('internlm2', P + '{"name": "f", "parameters": {"x": "\\ud83d"}}<|action_end|>', 'arguments', 'a lone surrogate'),  # noqa: E501
    ('internlm2', P + '[1]<|action_end|>', 'arguments', 'an object is expected, not [1]'),
    ('internlm2', P + '{"name": "f"}<|action_end|>', 'arguments', "'parameters' must be an object, but is missing"),  # noqa: E501
    ('internlm2', P + '{"name": "f", "parameters": [1]}', 'arguments', "must be an object, not [1]"),  # noqa: E501
    ('internlm2', P + '{"parameters": {}}<|action_end|>', 'name', 'its name None: letters'),
    ('internlm2', P + '{"name": "a b", "parameters": {}}', 'name', "its name 'a b': letters"),
    ('internlm2', P + '{"name": "python", "parameters": {}}', 'arguments', "'python' takes a text"),
    ('internlm2', '<|action_start|><|interpreter|>\n```python\nprint(', 'truncated', 'not closed'),
    ('internlm_v1_1', 'Thought:t\nAction:f\nActionInput:{"x": 1}\nResponse:3', 'trailing', 'text stands after'),  # noqa: E501
    ('internlm_v1_1', 'Thought:t\nAction:f\nActionInput:paris', 'json', 'Expecting value at character 0'),  # noqa: E501
    ('internlm_v1_1', 'Thought:t\nAction:f', 'format', "neither a whole call nor 'FinalAnswer:'"),
    ('internlm_v1_1', 'Thought:t', 'format', 'neither a whole call'),
    ('internlm_v1_1', 'Action:f\nActionInput:{}\nAction:g\nActionInput:{}', 'parallel', 'only one'),
    ('internlm_v1_1', 'Action:PythonInterpreter\nActionInput:{"command": "1"}', 'arguments', "'PythonInterpreter' takes a text 'code'"),  # noqa: E501
    ('chatml', '<tool_call>\n{"name": "f", "arguments": {"x": 1}', 'truncated', 'ends before'),
    ('chatml', '<tool_call>\n{"name": "f", "arguments": {}}}\n</tool_call>', 'trailing', 'text stands'),  # noqa: E501
    ('llama3', '{"name": "f", "parameters": {', 'truncated', 'ends before its JSON'),
]  # fmt: skip


@pytest.mark.parametrize(('name', 'text', 'kind', 'message'), BROKEN, ids=range(len(BROKEN)))
def test_what_is_broken_is_told_to_the_model(name, text, kind, message):
    template = build_template(name)
    error = read_answer(template, text).errors[0]
    assert error.kind == kind and message in error.message
    told = error.to_model()
    assert message in told and 'NAME' in told and '{"ARGUMENT": VALUE}' in told
    assert error.text and error.text in text


def test_calls_around_a_broken_one_are_read():
    form = '<tool_call>\n{}\n</tool_call>\n'.format
    good = [json.dumps({'name': name, 'arguments': {}}) for name in 'fg']
    text = form(good[0]) + form('{"name": "h", "arguments": {]}') + 'and\n' + form(good[1])
    answer = read_answer(build_template('chatml'), text)
    assert [one.name for one in answer.calls] == ['f', 'g']
    assert [error.kind for error in answer.errors] == ['json', 'trailing']
    assert answer.errors[1].text.strip() == 'and'


@settings(max_examples=100, deadline=None)
@given(data=some.data(), name=some.sampled_from(WITH_TOOLS))
def test_nothing_that_is_written_breaks_the_reader(data, name):
    template = build_template(name)
    pieces = ['Thought:', 'Action:', 'f', '\n', 'ActionInput:', '{', '}', '"name": "f"', ', ',
              '[', '"parameters": ', '"arguments": ', '<tool_call>', '</tool_call>', '```python\n',
              '```', 'FinalAnswer:', ' ', '\\', '"', ':', '1', *template.marks]  # fmt: skip
    text = ''.join(data.draw(some.lists(some.sampled_from(pieces), max_size=25)))
    answer = read_answer(template, text)
    assert all(error.text.strip() and error.text in text for error in answer.errors)
    json.dumps(answer.message(), ensure_ascii=False).encode()
