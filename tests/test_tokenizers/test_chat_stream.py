"""Answers that come in pieces, cut anywhere."""

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from internlm_mm.tokenizers import build_template
from internlm_mm.tokenizers.chat_parsing import read_answer
from internlm_mm.tokenizers.chat_stream import AnswerStream, Piece
from tests.conversations import NAMES, TOOLS, call

WITH_TOOLS = [name for name in NAMES if name != 'internlm']
QUESTION = {'role': 'user', 'content': 'Q'}
TEXTS = ['', 'I compute.', 'a\n\nb <b> <|x|> {', 'Act 1: x\nFin\n', '< <| <tool', '\n', 'Thought']


def streamed(template, pieces: list[str], **options) -> tuple[list[Piece], object]:
    stream = AnswerStream(template, **options)
    shown = [piece for text in pieces for piece in stream.feed(text)]
    rest, answer = stream.finish()
    return [*shown, *rest], answer


def joined(pieces: list[Piece], kind: str) -> str:
    return ''.join(piece.text for piece in pieces if piece.kind == kind)


def cut(data: some.DataObject, text: str) -> list[str]:
    places = data.draw(some.lists(some.integers(0, len(text)), max_size=8)) + [0, len(text)]
    places.sort()
    return [text[a:b] for a, b in itertools.pairwise(places)]


def written(template, message: dict, tools=TOOLS) -> str:
    segments = template.segments([QUESTION, message], tools)
    return ''.join(segment.text for segment in segments if segment.answer)


@pytest.mark.parametrize('name', WITH_TOOLS)
@settings(max_examples=40, deadline=None)
@given(data=some.data())
def test_cuts_make_no_difference(name, data):
    template = build_template(name)
    calls = [call('f', {'x': ['a <|']}, '1'), call('python', {'code': 'print("```")\n'}, '2')]
    message = {'role': 'assistant', 'content': data.draw(some.sampled_from(TEXTS))}
    chosen = data.draw(some.sampled_from([[], calls[:1], calls[1:], calls]))
    chosen = chosen if template.tools.parallel else chosen[:1]
    message |= {'tool_calls': chosen} if chosen else {}
    if template.strip:
        message['content'] = message['content'].strip()
    if template.tools.thought and data.draw(some.booleans()):
        message['reasoning_content'] = 'why?\nso'
    text = written(template, message)
    pieces, answer = streamed(template, cut(data, text))
    assert answer == read_answer(template, text) and not answer.errors
    thoughts = [answer.thought, answer.content] if answer.calls else [answer.thought]
    if template.tools.thought:
        assert joined(pieces, 'thought') == '\n'.join(filter(None, thoughts))
        assert joined(pieces, 'text') == ('' if answer.calls else answer.content)
    else:
        assert joined(pieces, 'text') == answer.content
    assert bool(joined(pieces, 'call')) == bool(answer.calls)
    assert all(piece.text for piece in pieces)


@pytest.mark.parametrize('name', WITH_TOOLS)
def test_text_is_shown_as_soon_as_it_is_certain(name):
    template = build_template(name)
    stream = AnswerStream(template)
    begin = template.tools.answer
    for character in begin:
        assert stream.feed(character) == []
    for word in ('The ', 'answer ', 'is <b>', ' 4', '2.'):
        assert stream.feed(word) == [Piece('text', word)]
    assert stream.finish() == ([], read_answer(template, f'{begin}The answer is <b> 42.'))


def test_calls_are_shown_while_they_are_written():
    template = build_template('internlm2')
    stream = AnswerStream(template)
    assert stream.feed('Well<|action') == [Piece('text', 'Well')]
    assert stream.feed('_start|>') == []
    assert stream.feed('<|interpreter|>\n```python\n') == [
        Piece('call', '<|action_start|><|interpreter|>\n```python\n')]  # fmt: skip
    assert stream.feed('print(1)') == [Piece('call', 'print(1)')]


def test_without_functions_everything_is_text():
    for name in NAMES:
        template = build_template(name)
        text = 'FinalAnswer:<tool_call>{"name": '
        pieces, answer = streamed(template, list(text + template.stop[0]), uses_tools=False)
        assert joined(pieces, 'text') == text == answer.content


def test_a_mark_that_begins_no_call_is_text_in_the_end():
    template = build_template('internlm2')
    pieces, answer = streamed(template, list('a<|action_start|>b'))
    assert joined(pieces, 'text') == answer.content == 'a<|action_start|>b'


def test_broken_calls_are_calls():
    template = build_template('chatml')
    pieces, answer = streamed(template, list('a\n<tool_call>\n{"name": '))
    assert [error.kind for error in answer.errors] == ['truncated']
    assert joined(pieces, 'text') == 'a' and joined(pieces, 'call') == '<tool_call>\n{"name": '


@pytest.mark.parametrize(
    'text', ['Action:f\n' * 5000, 'Action:' + ' ' * 40_000, '\n{"name": ' * 4000]
)
@pytest.mark.parametrize('name', ['internlm_v1_1', 'llama3'])
def test_what_never_becomes_a_call_takes_no_time(name, text):
    start = time.monotonic()
    stream = AnswerStream(build_template(name))
    for place in range(0, len(text), 4):
        stream.feed(text[place : place + 4])
    stream.finish()
    assert time.monotonic() - start < 10  # some tenths; waiting for an end took minutes
