"""A server that speaks OpenAI's protocol."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, cast

import openai

from web_chat.backend import BackendError, Settings
from web_chat.events import Event, Text
from web_chat.history import Message


class ServerBackend:
    """A server with OpenAI's `/chat/completions`; it has a template of its own.

    Args:
        url: Up to and with the version: 'http://127.0.0.1:8000/v1'.
        model: Which of its models; the first that it lists if None.
        api_key: What it knows us by.
        timeout: Longest silence, in seconds.
    """

    templates: Sequence[str] = ()
    template: str | None = None

    def __init__(
        self, url: str, model: str | None = None, api_key: str = 'none', timeout: float = 60.0
    ) -> None:
        self._client = openai.OpenAI(base_url=url, api_key=api_key, timeout=timeout, max_retries=0)
        self._url = url
        self._model = model
        self.name = model or url

    def answer(self, messages: Sequence[Message], settings: Settings) -> Generator[Event]:
        """Ask, and give what is streamed back."""
        try:
            yield from self._stream(messages, settings)
        except openai.APIStatusError as error:
            raise BackendError(
                f'{self._url} answered {error.status_code}: {error.message}'
            ) from error
        except openai.OpenAIError as error:
            cause = error.__cause__ or error
            raise BackendError(f'no answer from {self._url}: {cause}') from error

    def _stream(self, messages: Sequence[Message], settings: Settings) -> Generator[Event]:
        # Not of OpenAI's protocol; servers that know them take them beside it.
        extra: dict[str, Any] = {}
        if settings.top_k is not None:
            extra['top_k'] = settings.top_k
        if settings.repetition_penalty != 1:
            extra['repetition_penalty'] = settings.repetition_penalty
        stream: Any = self._client.chat.completions.create(
            model=self._model_name(),
            messages=cast(Any, messages),
            stream=True,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_new_tokens,
            stop=list(settings.stop) or openai.omit,
            extra_body=extra or None,
        )
        ended = False
        with stream:
            for chunk in stream:
                for choice in chunk.choices[:1]:
                    yield Text(choice.delta.content or '')
                    ended = ended or choice.finish_reason is not None
        if not ended:
            raise BackendError(f'{self._url} broke off in the middle of an answer')

    def _model_name(self) -> str:
        if self._model is None:
            models = self._client.models.list().data
            if not models:
                raise BackendError(f'{self._url} lists no model: name one with --model-name')
            self._model = models[0].id
            self.name = self._model
        return self._model
