"""An answer that is read while a model writes it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from internlm_mm.tokenizers.chat_format import ChatTemplate
from internlm_mm.tokenizers.chat_grammar import Marks, frames, loosely
from internlm_mm.tokenizers.chat_parsing import Answer, read_answer

Kind = Literal['text', 'thought', 'call']
# What a head begins with, by which a growing text may become one: a mark, a word, a brace.
_FIRST = re.compile(r'<\|?\w+\|?>|[^:\n]+:|.')

_LONGEST = 2000  # characters of what begins a call, with a name in it


class Piece(NamedTuple):
    """Some text, and what it is part of.

    Attributes:
        kind: 'text' is for the user; 'thought' is what stands before a call or an answer, where
            the template has thoughts; 'call' is a call, as the template spells it.
        text: Not empty.
    """

    kind: Kind
    text: str


class _Turn(NamedTuple):
    """Where the kind of text changes: how much is before, what is skipped, and the new kind."""

    start: int
    stop: int
    kind: Kind


class AnswerStream:
    """Takes what a model writes piece by piece, and tells text from calls as early as can be.

    Text that may still become the beginning of a call is held back. Of answers in the template's
    form, the pieces of text are the content to the letter.

    Args:
        template: That the prompt was spelt with.
        uses_tools: Whether functions are declared or called in the conversation.
    """

    def __init__(self, template: ChatTemplate, *, uses_tools: bool = True) -> None:
        self._template = template
        self._uses_tools = uses_tools
        self._marks = Marks(template)
        self._written: list[str] = []
        self._last = ''  # the last character before the rest
        self._rest = ''
        self._kind: Kind = 'text'
        self._open = False  # whether calls may come
        self._heads: list[re.Pattern[str]] = []
        self._words: set[str] = set()  # what to wait for where it stands
        self._lines: set[str] = set()  # what to wait for at the beginning of a line
        self._final = self._thought = self._before = ''
        if template.tools is None or not uses_tools:
            return
        form = template.tools
        self._open = True
        self._before = '\n' if form.answer else form.before_call
        for frame in frames(form, self._marks):
            self._heads.append(frame.head)
            first = _FIRST.match(self._marks.show(frame.first))
            assert first is not None
            at_line = not first.group().startswith('<')
            (self._lines if at_line else self._words).add(first.group())
        if form.answer:
            self._final = loosely(form.answer)
            self._thought = form.thought[0] if form.thought is not None else ''
            spaced = re.sub(r'(?<=[a-z])(?=[A-Z])', ' ', form.answer)
            self._lines |= {form.answer, spaced, self._thought} - {''}

    def feed(self, text: str) -> list[Piece]:
        """Take the next text; the pieces that are certain now."""
        self._written.append(text)
        self._rest += text
        return list(self._certain())

    def finish(self) -> tuple[list[Piece], Answer]:
        """The answer is complete: the pieces that were held back, and all of it, read."""
        for stop in self._template.stop:
            self._rest = self._rest.removesuffix(stop)
        pieces = list(self._certain())
        if self._rest:
            pieces.append(Piece(self._kind, self._rest))
        self._rest = ''
        whole = ''.join(self._written)
        return pieces, read_answer(self._template, whole, uses_tools=self._uses_tools)

    def _certain(self) -> Iterator[Piece]:
        while self._open and (turn := self._turn()) is not None:
            before = self._rest[: turn.start]
            if turn.kind == 'call':
                before = before.removesuffix(self._before)
            if before:
                yield Piece(self._kind, before)
            if turn.kind == self._kind == 'thought':
                yield Piece('thought', '\n')
            self._last = self._rest[: turn.stop][-1:] or self._last
            self._rest = self._rest[turn.stop :]
            self._kind = turn.kind
            self._open = turn.kind == 'thought'
        certain = self._rest[: self._held()]
        if certain:
            self._rest = self._rest[len(certain) :]
            self._last = certain[-1]
            yield Piece(self._kind, certain)

    def _turn(self) -> _Turn | None:
        """The first place in the rest where the kind changes."""
        hidden = self._last + self._marks.hide(self._rest)
        begin = len(self._last)
        found: list[tuple[re.Match[str], int, Kind]] = []
        for head in self._heads:
            match = head.search(hidden, begin)
            if match is not None:
                found.append((match, match.start(), 'call'))
        answer = re.compile(rf'(?:^|\n){self._final}').search(hidden, begin)
        if self._final and answer is not None:
            found.append((answer, answer.end(), 'text'))
        again = self._kind == 'thought' or not self._last
        thought = re.compile(rf'(?:^|\n){self._thought}').search(hidden, begin)
        if self._thought and again and thought is not None:
            found.append((thought, thought.end(), 'thought'))
        if not found:
            return None
        match, stop, kind = min(found, key=lambda one: one[0].start())
        length = [len(self._marks.show(hidden[begin:place])) for place in (match.start(), stop)]
        return _Turn(length[0], length[1], kind)

    def _held(self) -> int:
        """Where that part of the rest begins that may become something else."""
        size = len(self._rest)
        place = size
        waited = list(self._template.stop)
        if self._open:
            waited += [self._before + word for word in self._words] + list(self._words)
            waited += [f'\n{word}' for word in self._lines]
        for word in waited:
            for length in range(min(len(word), size), 0, -1):
                if self._rest.endswith(word[:length]):
                    place = min(place, size - length)
                    break
        begun = self._begun() if self._open else -1
        return min(place, begun) if 0 <= begun and size - begun < _LONGEST else place

    def _begun(self) -> int:
        """Where in the rest the last call may have begun, whose beginning is not complete; or -1.

        One that another follows is none.
        """
        place = max((self._rest.rfind(f'\n{word}') for word in self._lines), default=-1)
        for word in self._words:
            found = self._rest.rfind(word)
            if found >= 0 and self._rest.endswith(self._before, 0, found):
                found -= len(self._before)
            place = max(place, found)
        if place < 0 and not self._last:
            starts = (w.startswith(self._rest) or self._rest.startswith(w) for w in self._lines)
            place = 0 if any(starts) else -1
        return place
