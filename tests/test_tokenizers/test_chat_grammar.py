"""Frames of calls, by the strings of each template."""

import re

import pytest

from internlm_mm.tokenizers import build_template
from internlm_mm.tokenizers.chat_grammar import Marks, frames, loosely


def test_marks_are_characters_that_no_text_has():
    marks = Marks(build_template('internlm2'))
    text = 'a<|plugin|>b<|im_end|>'
    hidden = marks.hide(text)
    assert len(hidden) == 4 and marks.show(hidden) == text
    with pytest.raises(UnicodeEncodeError):
        hidden.encode()
    assert marks.hide(text, ['<|plugin|>']).startswith('a<|plugin|>b')
    assert marks.show('plain 文') == 'plain 文'


@pytest.mark.parametrize(
    ('name', 'heads', 'keys', 'tail'),
    [
        ('internlm2', ['<|action_start|><|plugin|>', '<|action_start|>\n<|plugin|>'], ('name', 'parameters'), '<|action_end|>'),  # noqa: E501
        ('chatml', ['<tool_call>'], ('name', 'arguments'), '</tool_call>'),
        ('internlm_v1_1', ['Action:f g\nActionInput:', 'Action: f g \n Action Input:'], None, ''),
        ('llama3', ['{"name": ', '{ "name" :'], ('name', 'parameters'), ''),
    ],
)  # fmt: skip
def test_frames(name, heads, keys, tail):
    template = build_template(name)
    marks = Marks(template)
    frame = list(frames(template.tools, marks))[-1]
    assert frame.keys == keys and marks.show(frame.tail) == tail and frame.fence is None
    for head in heads:
        for before in ('', 'Line.\n'):
            match = frame.head.search(before + marks.hide(head))
            assert match is not None and match.start() == len(before)
            assert keys or match.group('name').strip() == 'f g'


def test_code_has_its_fence():
    for name, opening in (('internlm2', '\n```python\n'), ('internlm_v1_1', '```python\n')):
        template = build_template(name)
        frame = next(frames(template.tools, Marks(template)))
        assert frame.fence == (opening, '\n```')


def test_text_protocols_begin_a_line():
    template = build_template('internlm_v1_1')
    frame = list(frames(template.tools, Marks(template)))[-1]
    assert frame.head.search('An Action:f\nActionInput:') is None


@pytest.mark.parametrize(
    ('spelling', 'text', 'reads'),
    [
        ('FinalAnswer:', 'Final Answer:', True),
        ('FinalAnswer:', 'FinalAnswer', False),
        ('Action:PythonInterpreter', 'Action: PythonInterpreter', True),
        ('a\nb', 'a \n\n b', True),
        ('a b', 'a\nb', False),
    ],
)
def test_words_are_loose_and_their_order_is_not(spelling, text, reads):
    assert bool(re.fullmatch(loosely(spelling), text)) == reads
