"""Conversations in OpenAI's form, looked over before a template spells them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from internlm_mm.utils.suggest import did_you_mean, kind

CODE_TOOL = 'python'
"""Name of the function whose argument `code` is a program for an interpreter."""

IMAGE = '[image]'
"""What is spelt for an image that a function gave."""

ROLES = ('system', 'user', 'assistant', 'tool')
_FIELDS = {
    'system': ('role', 'content', 'name', 'loss'),
    'user': ('role', 'content', 'name', 'loss'),
    'assistant': ('role', 'content', 'tool_calls', 'reasoning_content', 'loss'),
    'tool': ('role', 'content', 'name', 'tool_call_id', 'loss'),
}
_IGNORED = ('id', 'refusal', 'annotations', 'audio', 'images')
_AFTER = {
    '': ('system', 'user'),
    'system': ('user',),
    'user': ('assistant',),
    'assistant': ('user',),
    'tool': ('assistant', 'user'),
}
_NAME = re.compile(r'[\w.\-]+')


@dataclass(frozen=True, slots=True)
class Call:
    """A function that the assistant calls.

    Attributes:
        name: Of the function.
        arguments: By name.
        id: What its result refers to; None where there is no need.
    """

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """A message that has been looked over.

    Attributes:
        role: One of `ROLES`.
        content: Its text.
        name: Of a user or a file, or of the function that a tool's message answers for.
        calls: Of an assistant.
        thought: What an assistant thought before its answer.
        loss: Whether an assistant's message is trained on.
    """

    role: str
    content: str
    name: str = ''
    calls: tuple[Call, ...] = ()
    thought: str = ''
    loss: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that have been looked over, and the functions that may be called in them."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def uses_tools(self) -> bool:
        """Whether functions are declared or called."""
        return bool(self.tools) or any(message.calls for message in self.messages)


def read_conversation(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    where: str = '',
) -> Conversation:
    """Look over a conversation in OpenAI's form.

    One system message may come first. The user begins; an assistant's message follows the user or
    the results of the functions that the assistant called; every call has its result.

    Args:
        messages: Dicts with 'role' and 'content'; an assistant's may have 'tool_calls', whose
            arguments are a dict or JSON, 'reasoning_content', and 'loss', False where it is not
            to be trained on. A content of several texts, `[{'type': 'text', 'text': ...}]`, is
            their concatenation; in a tool's message there may be images among them,
            `{'type': 'image_url', 'image_url': {'url': ...}}`, for which `IMAGE` is spelt.
        tools: Dicts `{'type': 'function', 'function': {'name': ..., ...}}`.
        where: Begins error messages: 'record 17'.

    Raises:
        ValueError: Naming the message and the field.
    """
    where = f'{where}, ' if where else ''
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise ValueError(f'{where}messages: a list of dicts, not {kind(messages)}')
    if not messages:
        raise ValueError(f'{where}messages: there is none')
    order = _Order()
    read = []
    for index, message in enumerate(messages):
        try:
            if not isinstance(message, Mapping):
                raise ValueError(f'a dict with role and content, not {kind(message)}')
            read.append(order.put(_read_message(message), message))
        except ValueError as error:
            raise ValueError(f'{where}message {index}: {error}') from None
    return Conversation(tuple(read), _read_tools(tools, where))


class _Order:
    """Who may speak next, and which calls wait for their results."""

    def __init__(self) -> None:
        self._last = Message('', '')
        self._open: list[Call] = []

    def put(self, message: Message, source: Mapping[str, Any]) -> Message:
        """Take the next message; a tool's gets the name of the function that it answers for."""
        if message.role == 'tool':
            message = self._answer(message, source.get('tool_call_id'))
        elif self._open:
            names = ', '.join(repr(call.name) for call in self._open)
            raise ValueError(f'role {message.role!r}, but there is no result yet of {names}')
        else:
            allowed = _AFTER[self._last.role]
            named = message.role == self._last.role == 'user' and (message.name or self._last.name)
            if message.role not in allowed and not named:
                place = f'after {self._last.role!r}' if self._last.role else 'at the beginning'
                raise ValueError(f'role {message.role!r} {place}; {" or ".join(allowed)} may come')
        self._last = message
        self._open += message.calls
        return message

    def _answer(self, message: Message, call_id: Any) -> Message:
        if not self._open:
            raise ValueError("role 'tool', but no call waits for a result")
        for field, given in (('tool_call_id', call_id), ('name', message.name or None)):
            if given is None:
                continue
            waiting = [call.id if field == 'tool_call_id' else call.name for call in self._open]
            if given not in waiting:
                hint = did_you_mean(given, [name for name in waiting if name])
                raise ValueError(f'{field} {given!r} is of no call that waits for a result.{hint}')
        if call_id is None and not message.name and len({call.name for call in self._open}) > 1:
            raise ValueError('tool_call_id is missing, and several calls wait for a result')
        call = next(
            call
            for call in self._open
            if (call_id is None or call.id == call_id)
            and (not message.name or call.name == message.name)
        )
        self._open.remove(call)
        return Message('tool', message.content, call.name)


def _read_message(message: Mapping[str, Any]) -> Message:
    role = message.get('role')
    if role not in ROLES:
        raise ValueError(f'role {role!r} is none.{did_you_mean(role, ROLES)}')
    fields = _FIELDS[role]
    for key, value in message.items():
        if key not in fields and not (key in _IGNORED or value is None):
            raise ValueError(
                f'field {key!r} is none of a message of {role!r}.{did_you_mean(key, fields)}'
            )
    calls = _read_calls(message.get('tool_calls') or ())
    content = _read_content(message.get('content'), role, bool(calls))
    name = message.get('name') or ''
    if name and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ValueError(f'name {name!r}: letters, digits and any of . _ - only')
    thought = message.get('reasoning_content') or ''
    if not isinstance(thought, str):
        raise ValueError(f'reasoning_content: a text, not {kind(thought)}')
    loss = message.get('loss', role == 'assistant')
    if loss not in (True, False) or (loss and role != 'assistant'):
        raise ValueError(f'loss {loss!r}: True or False, and True for an assistant only')
    return Message(role, content, name, calls, thought, bool(loss))


def _read_content(content: Any, role: str, has_calls: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        if has_calls:
            return ''
        raise ValueError('content is missing')
    if not isinstance(content, Sequence):
        raise ValueError(f'content: a text, not {kind(content)}')
    text = ''
    for index, part in enumerate(content):
        given = part.get('text') if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and part.get('type') == 'image_url' and role == 'tool':
            given = f'\n{IMAGE}' if index else IMAGE
        if not isinstance(given, str):
            images = " (images in a tool's message alone)"
            raise ValueError(
                f"content: of parts, only {{'type': 'text', 'text': ...}} can be spelt{images}"
            )
        text += given
    return text


def _read_calls(calls: Any) -> tuple[Call, ...]:
    if isinstance(calls, (str, Mapping)) or not isinstance(calls, Sequence):
        raise ValueError(f'tool_calls: a list of dicts, not {kind(calls)}')
    return tuple(_read_call(call, f'tool_calls[{index}]') for index, call in enumerate(calls))


def _read_call(call: Any, field: str) -> Call:
    function = call.get('function') if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ValueError(f"{field}: a dict with 'function', not {call!r}")
    name = check_name(function.get('name'), f'{field}.function.name')
    arguments = function.get('arguments', {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise ValueError(f'{field}.function.arguments: no JSON ({error})') from None
    if not isinstance(arguments, Mapping):
        raise ValueError(f'{field}.function.arguments: an object, not {kind(arguments)}')
    if name == CODE_TOOL and not isinstance(arguments.get('code'), str):
        raise ValueError(f"{field}.function.arguments: {CODE_TOOL!r} takes a text 'code'")
    return Call(name, dict(arguments), call.get('id'))


def _read_tools(
    tools: Sequence[Mapping[str, Any]] | None, where: str
) -> tuple[dict[str, Any], ...]:
    for index, tool in enumerate(tools or ()):
        field = f'{where}tools[{index}]'
        function = tool.get('function') if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping):
            raise ValueError(f"{field}: {{'type': 'function', 'function': {{...}}}}, not {tool!r}")
        check_name(function.get('name'), f'{field}.function.name')
        if not isinstance(function.get('description', ''), str):
            raise ValueError(f'{field}.function.description: a text')
    return tuple(dict(tool) for tool in tools or ())


def check_name(name: Any, field: str) -> str:
    """A function's name, unless it is none.

    Raises:
        ValueError: Which begins with `field`.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f'{field} {name!r}: letters, digits and any of . _ - only')
    return name
