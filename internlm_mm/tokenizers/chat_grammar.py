"""A template's strings as patterns, by which what a model wrote is found again."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

from internlm_mm.tokenizers.chat_format import ChatTemplate
from internlm_mm.tokenizers.chat_spelling import ToolFormat

_FENCE = '```'
_MARK = '[\ud800-\udfff]'


class Marks:
    """Marks and words as one character each, of those that no text has: lone surrogates.

    Args:
        template: Whose they are.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._hidden = {
            mark: chr(0xD800 + n) for n, mark in enumerate((*template.marks, *template.words))
        }
        self._shown = {hidden: mark for mark, hidden in self._hidden.items()}

    def hide(self, text: str, but: Collection[str] = ()) -> str:
        """Make every mark that a text spells a character, except those that are named."""
        for mark, hidden in self._hidden.items():
            if mark not in but:
                text = text.replace(mark, hidden)
        return text

    def show(self, text: str) -> str:
        """A text with its marks spelt again."""
        if text.isascii():
            return text
        return ''.join(self._shown.get(character, character) for character in text)


class Frame(NamedTuple):
    """What stands around a call, marks hidden.

    Attributes:
        head: Pattern of what begins it; with a group 'name' where the name stands in it.
        first: How it begins, for who watches a text grow.
        tail: What ends it; '' where the answer's end does.
        keys: Of name and arguments in the call's JSON; None where the JSON is the arguments.
        fence: What is around code, where the call is code.
    """

    head: re.Pattern[str]
    first: str
    tail: str
    keys: tuple[str, str] | None = None
    fence: tuple[str, str] | None = None


def frames(form: ToolFormat, marks: Marks) -> Iterator[Frame]:
    """Frames of the calls of a template; that of code, which others resemble, first."""
    if form.code is not None:
        yield _code_frame(marks.hide(form.code))
    yield _call_frame(marks.hide(form.call))


def loosely(text: str) -> str:
    """Pattern of a template's words: with a blank inside or none, in another line or in one.

    'ActionInput:' is 'Action Input:' too, and a blank may stand between two marks.
    """
    lines = []
    for line in text.split('\n'):
        words = re.sub(r'(?<=[a-z])(?=[A-Z])|(?<=:)(?=\S)', ' ', line).split()
        lines.append(r'[ \t]*'.join(map(re.escape, words)))
    pattern = r'\s*'.join(line for line in lines if line)
    return re.sub(f'(?<={_MARK})(?={_MARK})', r'\\s*', pattern)


def _code_frame(code: str) -> Frame:
    before, after = code.split('{code}')
    head, _, language = before.partition(_FENCE)
    closing, _, tail = after.partition(_FENCE)
    blank = head[len(head.rstrip()) :]
    fence = (f'{blank}{_FENCE}{language}', f'{closing}{_FENCE}')
    return Frame(
        re.compile(_at_line(head)), head.split('\n')[0].rstrip(), tail.strip(), None, fence
    )


def _call_frame(call: str) -> Frame:
    in_json = re.fullmatch(
        r'(.*?)\{"(\w+)": "\{name\}", "(\w+)": \{arguments\}\}(.*)', call, re.DOTALL
    )
    if in_json is None:  # a line with the name, and then the arguments
        head, rest = call.split('{name}')
        middle, tail = rest.split('{arguments}')
        pattern = rf'{_at_line(head)}(?P<name>[^\n]*)\n\s*{loosely(middle)}'
        return Frame(re.compile(pattern), head, tail.strip())
    head, name, arguments, tail = in_json.groups()
    pattern = _at_line(head) if head else _at_line('') + rf'(?=\{{\s*"{name}"\s*:)'
    return Frame(re.compile(pattern), head.strip() or '{', tail.strip(), (name, arguments))


def _at_line(head: str) -> str:
    """Pattern of a head, which begins a line unless it has marks or tags of its own."""
    alone = bool(re.match(rf'{_MARK}|<', head))
    return loosely(head) if alone else rf'(?:(?<=\n)|^){loosely(head)}'
