"""A model in this process."""

from __future__ import annotations

import threading
from collections import abc
from pathlib import Path

import torch

from internlm_mm.api import from_pretrained
from internlm_mm.inference import Chat, Generator, Sampling, template_for
from internlm_mm.registry import CHAT_TEMPLATES
from web_chat.backend import Settings
from web_chat.events import Event, Text
from web_chat.history import Message


class LocalBackend:
    """A model of this process; several pages take turns, one answer at a time.

    Args:
        generator: The model with its tokenizer.
        template: Name of the template that suits it.
        name: What the page calls it.

    Raises:
        ValueError: If there is no such template, or no tokenizer.
    """

    def __init__(self, generator: Generator, template: str, name: str) -> None:
        Chat(generator, template)  # or an error, before anybody asks
        self.generator = generator
        self.template: str | None = template
        self._template = template
        self.templates: abc.Sequence[str] = sorted(CHAT_TEMPLATES.module_dict)
        self.name = name
        self._lock = threading.Lock()

    def answer(self, messages: abc.Sequence[Message], settings: Settings) -> abc.Generator[Event]:
        """Answer once nobody else is being answered."""
        chat = Chat(self.generator, settings.template or self._template)
        sampling = Sampling(
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            repetition_penalty=settings.repetition_penalty,
            max_new_tokens=settings.max_new_tokens,
            stop=settings.stop,
        )
        while not self._lock.acquire(timeout=0.1):
            yield Text('')
        try:
            yield Text('')
            for piece in chat.stream(messages, sampling):
                yield Text(piece)
        finally:
            self._lock.release()


def load(path: str, template: str | None, device: str | None, dtype: str | None) -> LocalBackend:
    """Load a model.

    Args:
        path: A work dir, a checkpoint or a Hugging Face folder.
        template: Name of a chat template; what suits the model if None.
        device: As `from_pretrained` takes it.
        dtype: Of the parameters, by name.

    Raises:
        FileNotFoundError: If there is no model.
        ValueError: If it is damaged or fits nothing here.
    """
    generator = from_pretrained(
        path, device=device, dtype=None if dtype is None else getattr(torch, dtype)
    )
    return LocalBackend(generator, template or template_for(path), Path(path).resolve().name)
