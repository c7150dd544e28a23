"""What the page asks of whoever answers."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from web_chat.events import Event
from web_chat.history import Message


class BackendError(Exception):
    """What a backend cannot do, in a sentence that the page shows as it is."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the page lets the user choose; the defaults are InternLM's.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: Share of probability that is drawn from.
        top_k: Draw from the k likeliest tokens only; None for all.
        repetition_penalty: Above 1 makes tokens that were used already less likely.
        max_new_tokens: Longest answer, in tokens.
        stop: Strings that end an answer.
        template: How a conversation is spelt, one of the backend's `templates`.
    """

    temperature: float = 0.7
    top_p: float = 0.8
    top_k: int | None = None
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    template: str | None = None


class Backend(Protocol):
    """Answers conversations.

    Attributes:
        name: What the page calls it.
        templates: Names to choose a template from; empty if there is nothing to choose.
        template: The one that suits the model.
    """

    name: str
    templates: Sequence[str]
    template: str | None

    def answer(self, messages: Sequence[Message], settings: Settings) -> Generator[Event]:
        """Answer the last message; closing the iterator stops the work.

        Args:
            messages: Of OpenAI's form, the last one the user's.
            settings: How.

        Raises:
            BackendError: And ValueError or OSError, with one sentence for the user.
        """
        ...
