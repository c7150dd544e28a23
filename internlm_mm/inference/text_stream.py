"""Text of tokens that come one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = '\ufffd'  # what the first bytes of a longer character decode to


class TextStream:
    """Text of tokens, given out as soon as no later token can change it.

    Held back are the first bytes of a character and what may become a stop string. A token costs
    the decoding of the few tokens since the last piece of text, not of all.

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
        self._ids: list[int] = []  # those from `context` on
        self._known = 0  # ids whose text is known
        self._known_text = ''
        self._held = ''

    def push(self, token: int) -> str:
        """Take a token; return the text that is now certain."""
        if self.stopped:
            return ''
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(_INCOMPLETE):
            return ''
        piece = text[len(self._known_text) :]
        if piece.strip():
            # Decoders strip or join only at the beginning, so the ids of this piece, which is no
            # mere space, are context enough for those that follow.
            del self._ids[: self._known]
            text = self._decode(self._ids)
        self._known, self._known_text = len(self._ids), text
        return self._release(piece)

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
