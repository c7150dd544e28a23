"""A server that speaks OpenAI's protocol, asked with nothing but Python's own library."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from internlm_mm.inference import Sampling
from internlm_mm.tokenizers import ChatTemplate, build_template
from internlm_mm.tokenizers.chat_messages import CODE_TOOL, IMAGE
from lagent_chat.models import Message

MOST = 100_000_000
"""Longest answer that is taken, in bytes: a server may be anybody's."""


class ServerError(OSError):
    """A server did not answer, or not in OpenAI's protocol."""


class Server:
    """A model behind `/chat/completions`.

    Calls come as `tool_calls`, or in the text, where a server knows nothing of calls. Either way
    they are given on as the template spells them, so that whoever reads answers reads one form.

    Args:
        url: Up to and with the version: 'http://127.0.0.1:8000/v1'.
        sampling: How it draws.
        template: Which one; of the server only where it leaves calls in the text.
        model: Which of its models; the first that it lists if None.
        api_key: What it knows us by.
        timeout: Longest silence, in seconds.
    """

    def __init__(
        self,
        url: str,
        sampling: Sampling,
        template: str = 'chatml',
        model: str | None = None,
        api_key: str = 'none',
        timeout: float = 120.0,
    ) -> None:
        self.template: ChatTemplate = build_template(template)
        self.sampling = sampling
        self._url = url.rstrip('/')
        self._key = f'Bearer {api_key}'
        self._timeout = timeout
        self.name = model or self._first_model()

    def __call__(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> Iterator[str]:
        """Answer the last message; see `Speaker`."""
        request: dict[str, Any] = {
            'model': self.name,
            'messages': [_plain(message) for message in messages],
            'stream': True,
            **_drawn(self.sampling),
            **({'tools': list(tools)} if tools else {}),
        }
        calls: dict[int, dict[str, str]] = {}
        text, ended = '', False
        for chunk in self._events(request):
            if chunk.get('error'):
                self._refuse(f'said {_short(chunk["error"])}')
            choices = chunk.get('choices')
            if not isinstance(choices, list) or not all(isinstance(c, Mapping) for c in choices):
                self._refuse(f'sent no choices but {_short(chunk)}')
            for choice in choices[:1]:
                delta = choice.get('delta') or choice.get('message') or {}
                piece = delta.get('content')
                if isinstance(piece, str) and piece:
                    text += piece
                    yield piece
                else:
                    yield ''  # whoever listens may leave
                for call in delta.get('tool_calls') or ():
                    _gather(calls, call)
                ended = ended or choice.get('finish_reason') is not None
        if not ended:
            self._refuse('broke off in the middle of an answer')
        if calls:
            yield spell_calls(self.template, [calls[key] for key in sorted(calls)], bool(text))

    def _events(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """What is sent: objects behind `data:`, or one object for a server that does not stream."""
        body = json.dumps(request).encode()
        with self._open('chat/completions', body) as answer:
            taken = 0
            if 'event-stream' not in answer.headers.get('Content-Type', ''):
                yield self._object(self._read(answer, MOST))
                return
            while line := self._read(answer, MOST, line=True):
                taken += len(line)
                if taken > MOST:
                    self._refuse(f'sent more than {MOST:,} bytes')
                data = line.strip().removeprefix(b'data:').strip()
                if data == b'[DONE]':
                    return
                if line.startswith(b'data:') and data:
                    yield self._object(data)

    def _first_model(self) -> str:
        with self._open('models') as answer:
            listed = self._object(self._read(answer, MOST)).get('data')
        try:
            return str(listed[0]['id'])  # type: ignore[index]
        except (TypeError, KeyError, IndexError):
            self._refuse('lists no model: name one with --model-name')

    def _open(self, path: str, body: bytes | None = None) -> Any:
        try:
            request = urllib.request.Request(f'{self._url}/{path}', body)
            request.add_header('Content-Type', 'application/json')
            request.add_unredirected_header('Authorization', self._key)  # for nobody else
            return urllib.request.urlopen(request, timeout=self._timeout)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(2000).decode('utf-8', 'replace')
            self._refuse(f'answered {error.code} {error.reason}: {_message(said)}')
        except (OSError, ValueError) as error:
            self._refuse(f'does not answer: {getattr(error, "reason", error)}')

    def _read(self, answer: Any, most: int, line: bool = False) -> bytes:
        try:
            return answer.readline(most) if line else answer.read(most)
        except (OSError, ValueError) as error:  # http.client's errors are neither: see below
            self._refuse(f'fell silent: {error}')
        except Exception as error:
            self._refuse(f'broke off: {error!r}')

    def _object(self, data: bytes) -> dict[str, Any]:
        try:
            given = json.loads(data)
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            self._refuse(f'sent no JSON object but {_short(data.decode("utf-8", "replace"))}')
        return given

    def _refuse(self, what: str) -> NoReturn:
        raise ServerError(f'{self._url} {what}')


def spell_calls(
    template: ChatTemplate, calls: Sequence[Mapping[str, str]], follows_text: bool
) -> str:
    """Calls of a server as a template spells them.

    Args:
        template: It.
        calls: Each with 'name' and 'arguments', JSON as the server sent it: it may be malformed,
            and stays so.
        follows_text: Whether a text stands before them.
    """
    form = template.tools
    if form is None:
        return json.dumps([dict(call) for call in calls], ensure_ascii=False)
    spelt = []
    for call in calls:
        code = _code(call)
        if form.code is not None and code is not None:
            spelt.append(form.code.replace('{code}', code))
            continue
        name = form.code_name if call['name'] == CODE_TOOL else call['name']
        head, tail = form.call.split('{arguments}')
        spelt.append(head.replace('{name}', name) + (call['arguments'] or '{}') + tail)
    before = ('\n' if form.answer else form.before_call) if follows_text else ''
    return before + form.between_calls.join(spelt)


def _code(call: Mapping[str, str]) -> str | None:
    """The program of a call of `python` that has nothing else."""
    try:
        arguments = json.loads(call['arguments'])
    except (ValueError, RecursionError):
        return None
    alone = isinstance(arguments, dict) and set(arguments) == {'code'}
    if call['name'] != CODE_TOOL or not alone or not isinstance(arguments['code'], str):
        return None
    return None if '```' in arguments['code'] else arguments['code']


def _gather(calls: dict[int, dict[str, str]], piece: Any) -> None:
    """Put a piece of a call to what is there of it."""
    if not isinstance(piece, Mapping):
        return
    function = piece.get('function') or {}
    if not isinstance(function, Mapping):
        return
    index = piece.get('index')
    if not isinstance(index, int):  # some leave it out where every piece is a whole call
        index = len(calls) if function.get('name') else max(len(calls) - 1, 0)
    call = calls.setdefault(index, {'name': '', 'arguments': ''})
    call['name'] += str(function.get('name') or '')
    arguments = function.get('arguments') or ''
    call['arguments'] += arguments if isinstance(arguments, str) else json.dumps(arguments)


def _plain(message: Message) -> Message:
    """A message as every server takes it: no fields of ours, arguments and results as texts."""
    kept = {k: v for k, v in message.items() if k in ('role', 'content', 'name', 'tool_call_id')}
    if message['role'] == 'assistant' and message.get('tool_calls'):
        kept['tool_calls'] = [_plain_call(call) for call in message['tool_calls']]
    if isinstance(kept.get('content'), list):
        parts = [part.get('text', IMAGE) for part in kept['content']]
        kept['content'] = '\n'.join(parts)
    return kept


def _plain_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call['function'])
    if not isinstance(function.get('arguments', ''), str):
        function['arguments'] = json.dumps(function['arguments'], ensure_ascii=False)
    return {'id': call.get('id'), 'type': 'function', 'function': function}


def _drawn(sampling: Sampling) -> dict[str, Any]:
    fields: dict[str, Any] = {
        'temperature': sampling.temperature,
        'top_p': sampling.top_p,
        'max_tokens': sampling.max_new_tokens,
    }
    if sampling.stop:
        fields['stop'] = list(sampling.stop)
    if sampling.seed is not None:
        fields['seed'] = sampling.seed
    # Not of OpenAI's protocol; servers that know them take them beside it.
    if sampling.top_k is not None:
        fields['top_k'] = sampling.top_k
    if sampling.repetition_penalty != 1:
        fields['repetition_penalty'] = sampling.repetition_penalty
    return fields


def _message(said: str) -> str:
    """The sentence in a server's error."""
    try:
        given = json.loads(said)
        error = given.get('error', given)
        return _short(error.get('message', error) if isinstance(error, Mapping) else error)
    except (ValueError, AttributeError):
        if said.lstrip().startswith('<'):
            return 'a page, no JSON. URLs of such servers end in /v1 as a rule'
        return _short(said)


def _short(value: object) -> str:
    text = ' '.join(str(value).split())
    return text if len(text) <= 300 else f'{text[:300]}...'
