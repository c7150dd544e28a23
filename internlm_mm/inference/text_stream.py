"""Text of tokens that come one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

_INCOMPLETE = '\ufffd'  # what the first bytes of a longer character decode to

_CHARACTER = 4  # tokens that a character may have: its bytes
_WAIT = 4 * _CHARACTER  # tokens after which what is no text yet, or mere space, is no beginning


class Written(str):
    """A text that a model wrote.

    Args:
        text: The text.
        whole: Whether it came to an end of its own. False where the room for it ended.

    Attributes:
        whole: As given.
    """

    whole: bool

    def __new__(cls, text: str, whole: bool = True) -> Self:
        """A text that remembers."""
        written = super().__new__(cls, text)
        written.whole = whole
        return written


class TextStream:
    """Text of tokens, given out as soon as no later token can change it.

    Held back are the first bytes of a character and what may become a stop string. A token costs
    the decoding of some dozens of tokens at most, not of all, also in runs of bytes that are no
    text, of spaces, and of tokens without text.

    Args:
        decode: Token ids to text.
        stop: Strings that end the text. The one that is complete first counts, of two that are
            complete at once the longer.

    Attributes:
        stopped: Whether a stop string has come; nothing follows it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._decode = decode
        self._stop = stop
        self._ids: list[int] = []  # the last ones, the first of them as context of the others
        self._context = 0  # ids that are context and nothing else
        self._known = 0  # ids whose text is known
        self._known_text = ''
        self._held = ''

    def push(self, token: int) -> str:
        """Take a token; return the text that is now certain."""
        if self.stopped:
            return ''
        self._ids.append(token)
        known, text = self._certain(self._decode(self._ids))
        if known == self._known:
            return ''
        piece = text[len(self._known_text) :]
        if piece.strip():
            # Decoders strip or join only at the beginning, so the ids of this piece, which is no
            # mere space, are context enough for those that follow.
            self._context = known - self._known
            self._forget(0, self._known, known)
        elif known - self._context > _WAIT:
            self._forget(self._context, known - _CHARACTER, known)
        else:
            self._known, self._known_text = known, text
        return self._release(piece)

    def _certain(self, text: str) -> tuple[int, str]:
        """How many of the ids no later one can change, and their text.

        Args:
            text: Of all ids.
        """
        if not text.endswith(_INCOMPLETE):
            return len(self._ids), text
        if len(self._ids) - self._known > _WAIT:  # no character: it will not become text
            latest = len(self._ids) - _CHARACTER
            cuts = range(latest, latest - _CHARACTER, -1)
            begins = ((self._decode(self._ids[:cut]), cut) for cut in cuts)
            found = [(len(begin), cut, begin) for begin, cut in begins if text.startswith(begin)]
            if found:  # a cut within a character makes marks of its bytes: more of them
                _, cut, begin = min(found)
                return cut, begin
        return self._known, self._known_text

    def _forget(self, begin: int, end: int, known: int) -> None:
        """Give up ids whose text is known, so that `known` of those before are left."""
        del self._ids[begin:end]
        self._known = known - (end - begin)
        self._known_text = self._decode(self._ids[: self._known])

    def finish(self) -> str:
        """The rest of the text, once the last token has been pushed."""
        if self.stopped:
            return ''
        piece = self._decode(self._ids)[len(self._known_text) :]
        text = self._release(piece) + self._held
        self._held = ''
        return text

    def _release(self, piece: str) -> str:
        """Text of `held + piece` that is certain; the rest is held."""
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ''
            return text[: min(found)[1]]
        longest = max(map(len, self._stop), default=1) - 1
        held = next(
            size
            for size in range(min(longest, len(text)), -1, -1)
            if not size or any(stop.startswith(text[-size:]) for stop in self._stop)
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
