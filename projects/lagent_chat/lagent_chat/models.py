"""Who answers: a model of this process, or a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from internlm_mm.api import from_pretrained
from internlm_mm.inference import Chat, Sampling, template_for
from internlm_mm.tokenizers import ChatTemplate

Message = dict[str, Any]


class Speaker(Protocol):
    """Goes on from messages.

    Attributes:
        name: What it is called.
        template: How what it writes is to be read.
        sampling: How it draws; may be replaced at any time.
    """

    name: str
    template: ChatTemplate
    sampling: Sampling

    def __call__(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> Iterator[str]:
        """Answer the last message.

        Args:
            messages: In OpenAI's form, the last one the user's or a tool's.
            tools: Functions that may be called, in OpenAI's form.

        Returns:
            Iterator over pieces of the answer; calls are in them as the template spells them.

        Raises:
            OSError: If nobody answers.
            ValueError: If the messages cannot be spelt, or are too long.
        """
        ...


class LocalModel:
    """A model of this process.

    Args:
        chat: The model and its template.
        name: What it is called.
        sampling: How it draws.
    """

    def __init__(self, chat: Chat, name: str, sampling: Sampling) -> None:
        self.chat = chat
        self.name = name
        self.template = chat.template
        self.sampling = sampling

    def __call__(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> Iterator[str]:
        """Answer the last message; see `Speaker`."""
        return self.chat.stream(messages, self.sampling, tools)


def load_model(
    path: str,
    sampling: Sampling,
    template: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> LocalModel:
    """Load a model.

    Args:
        path: A work dir, a checkpoint, or a folder of Hugging Face or PEFT.
        sampling: How it draws.
        template: Name of its chat template; what suits it if None.
        device: As `from_pretrained` takes it.
        dtype: Of the parameters, by name.

    Raises:
        FileNotFoundError: If there is no model.
        ValueError: If it is damaged, fits nothing here, or there is no such template.
    """
    name = template or template_for(path)
    generator = from_pretrained(
        path, device=device, dtype=None if dtype is None else getattr(torch, dtype)
    )
    return LocalModel(Chat(generator, name), path, sampling)
