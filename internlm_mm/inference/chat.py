"""Conversations with a model: a template in front of a generator."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from internlm_mm.inference.generator import Generator
from internlm_mm.inference.sampling import Sampling
from internlm_mm.tokenizers import ChatTemplate, Tokenizer, build_template


class ChatPrompts:
    """Conversations as the tokens that a model goes on from, and what ends its answers.

    Args:
        template: How conversations are spelt.
        tokenizer: The model's.
        add_bos: Whether they begin with the tokenizer's bos.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, add_bos: bool = True) -> None:
        self.template, self.tokenizer, self.add_bos = template, tokenizer, add_bos
        # Marks that the vocabulary calls otherwise, which come out as single tokens' texts.
        self.aliases = {
            alias: mark
            for mark, alias in template.aliases.items()
            if tokenizer.token_id(mark) is None and tokenizer.token_id(alias) is not None
        }

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Tokens in front of an answer; arguments as in `Chat.stream`.

        Raises:
            ValueError: If the conversation is none or cannot be spelt.
        """
        default = self.template.default_system
        if default and messages and messages[0].get('role') != 'system':
            messages = [{'role': 'system', 'content': default}, *messages]
        encoded = self.template.encode(
            self.tokenizer,
            messages,
            tools,
            add_generation_prompt=True,
            add_bos=self.add_bos,
        )
        return encoded.ids

    def with_stops(self, sampling: Sampling) -> Sampling:
        """The same, with what ends the template's answers."""
        ids, strings = self.template.stops(self.tokenizer)
        return dataclasses.replace(
            sampling,
            stop_ids=(*sampling.stop_ids, *ids),
            stop=(*sampling.stop, *strings),
        )

    def by_name(self, text: str) -> str:
        """Marks in an answer, or a piece of one, under the template's names."""
        for alias, mark in self.aliases.items():
            text = text.replace(alias, mark)
        return text


class Chat:
    """Answers conversations.

    An answer ends at the template's own marks: by their tokens, or by their spelling where the
    tokenizer does not have them.

    Args:
        generator: The model with its tokenizer.
        template: How conversations are spelt: a name, a dict with `type`, or the template itself.

    Raises:
        ValueError: If there is no such template, or no tokenizer.
    """

    def __init__(
        self, generator: Generator, template: str | Mapping[str, Any] | ChatTemplate
    ) -> None:
        if generator.tokenizer is None:
            raise ValueError('this model has no tokenizer beside it: it cannot chat')
        self.generator = generator
        self.template = build_template(template)
        self._prompts = ChatPrompts(self.template, generator.tokenizer, generator.add_bos)

    def stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: Sampling | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Iterator[str]:
        """Answer the last message, giving each piece of text as soon as it is known.

        Args:
            messages: Of OpenAI's form, the last one the user's or a tool's. Without a system's
                message, the template's `default_system` is put first; an empty one keeps it away.
            sampling: How to draw; greedily by default.
            tools: The functions that the model may call.

        Returns:
            Iterator over pieces; calls are in them as the template spells them. Closing it ends
            the work.

        Raises:
            ValueError: If the conversation is none, cannot be spelt or is too long.
        """
        ids = self.prompt(messages, tools)
        pieces = self.generator.stream_ids(ids, self._prompts.with_stops(sampling or Sampling()))
        return self._by_name(pieces) if self._prompts.aliases else pieces

    def answer(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: Sampling | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The whole answer to the last message; arguments as in `stream`."""
        return ''.join(self.stream(messages, sampling, tools))

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """The tokens that the model goes on from; arguments as in `stream`."""
        return self._prompts.encode(messages, tools)

    def _by_name(self, pieces: Iterator[str]) -> Iterator[str]:
        """Marks in an answer under the template's names."""
        for piece in pieces:
            yield self._prompts.by_name(piece)
