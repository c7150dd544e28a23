"""Traces of Lagent: the messages of an agent's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from internlm_mm.datasets.forms.fields import (
    Message,
    Parts,
    a_call,
    calling,
    list_of,
    need,
    one_call,
    plain_text,
    text_of,
    to_json,
    tools_of,
)
from internlm_mm.utils.suggest import kind

_CODE = 'python'
_USER, _AGENT, _EXECUTOR = 'user', 'Agent', 'ActionExecutor'
_KINDS = ('plugin', 'interpreter')


def fits(record: Mapping[str, Any]) -> bool:
    """Whether a record is in this form."""
    return isinstance(record.get('memory'), list)


def read(record: Mapping[str, Any]) -> Parts:
    """Messages, and the functions of `tools`, which Lagent itself does not store.

    An agent's message has what its parser made of it in `formatted`: `tool_type`, `thought` and
    `action`. Whoever speaks after a call is what ran it.

    Raises:
        ValueError: With the field that is wrong.
    """
    messages: list[Message] = []
    waits = False
    for index, said in enumerate(list_of(need(record, 'memory'), 'memory')):
        field = f'memory[{index}]'
        if not isinstance(said, Mapping):
            raise ValueError(f'{field}: an object with sender and content, not {kind(said)}')
        formatted = said.get('formatted')
        sender = said.get('sender', _USER)
        if waits:
            messages.append({'role': 'tool', 'content': _result(said.get('content'))})
            waits = False
        elif sender in (_USER, 'system'):
            messages.append(
                {'role': sender, 'content': text_of(said.get('content'), f'{field}.content')}
            )
        elif isinstance(formatted, Mapping) and formatted.get('tool_type'):
            messages.append(_calling(formatted, f'{field}.formatted'))
            waits = True
        else:
            content = said.get('content')
            if isinstance(formatted, Mapping) and isinstance(formatted.get('thought'), str):
                content = formatted['thought'] or content
            messages.append({'role': 'assistant', 'content': text_of(content, f'{field}.content')})
    return messages, tools_of(record)


def write(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A record of this form.

    Raises:
        ValueError: If the form has no place for something.
    """
    memory = []
    for index, message in enumerate(messages):
        text, role = plain_text(message, index), message['role']
        formatted: dict[str, Any] | None = None
        if role == 'assistant':
            called = one_call(message, index)
            formatted = {'tool_type': None, 'thought': text, 'action': None, 'status': 0}
            if called is not None:
                name, arguments = called
                code = name == _CODE and list(arguments) == ['code']
                formatted['tool_type'] = _KINDS[code]
                formatted['action'] = (
                    arguments['code'] if code else {'name': name, 'parameters': arguments}
                )
                formatted['status'] = 1
        sender = {'assistant': _AGENT, 'tool': _EXECUTOR}.get(role, role)
        memory.append({'sender': sender, 'content': text, 'formatted': formatted})
    record: dict[str, Any] = {'memory': memory}
    if tools:
        record['tools'] = list(tools)
    return record


def _calling(formatted: Mapping[str, Any], field: str) -> Message:
    tool_type, action = formatted['tool_type'], formatted.get('action')
    thought = text_of(formatted.get('thought') or '', f'{field}.thought')
    if tool_type not in _KINDS and not isinstance(action, Mapping):
        raise ValueError(f'{field}.tool_type {tool_type!r}: {" or ".join(map(repr, _KINDS))}')
    if isinstance(action, str):
        return calling(thought, [a_call(_CODE, {'code': action})])
    if not isinstance(action, Mapping) or not isinstance(action.get('name'), str):
        raise ValueError(f'{field}.action: code, or an object with name and parameters')
    parameters = action.get('parameters') or {}
    if tool_type == 'interpreter' and isinstance(parameters, Mapping) and 'command' in parameters:
        return calling(thought, [a_call(_CODE, {'code': parameters['command']})])
    return calling(thought, [a_call(action['name'], parameters)])


def _result(content: Any) -> str:
    """What ran a call says: a text, or a list of texts and files."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(item, Mapping) for item in content):
        return '\n'.join(
            str(item.get('content', ''))
            if item.get('type') == 'text'
            else f'[{item.get("type")}]({item.get("content")})'
            for item in content
        )
    return to_json(content)
