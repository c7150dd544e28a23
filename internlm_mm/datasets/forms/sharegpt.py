"""ShareGPT's form, with calls as turns of `function_call` and results as `observation`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from internlm_mm.datasets.forms.fields import (
    Message,
    Parts,
    calls_of,
    is_context,
    list_of,
    loss_of,
    named,
    need,
    parsed,
    plain_text,
    system_of,
    text_of,
    to_json,
    tools_of,
    unknown_speaker,
)
from internlm_mm.utils.suggest import kind

_SPEAKERS = {
    'system': 'system',
    'human': 'user',
    'user': 'user',
    'gpt': 'assistant',
    'assistant': 'assistant',
    'function_call': 'calls',
    'observation': 'tool',
    'tool': 'tool',
}


def read(record: Mapping[str, Any]) -> Parts:
    """Messages and functions.

    Raises:
        ValueError: With the field that is wrong.
    """
    messages = system_of(record)
    turns = list_of(parsed(need(record, 'conversations'), 'conversations'), 'conversations')
    for index, turn in enumerate(turns):
        field = f'conversations[{index}]'
        if not isinstance(turn, Mapping):
            raise ValueError(f'{field}: an object with from and value, not {kind(turn)}')
        speaker = turn.get('from', turn.get('role'))
        role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise unknown_speaker(field, speaker, _SPEAKERS)
        text = text_of(turn.get('value', turn.get('content')), f'{field}.value')
        message: Message = {'role': role, 'content': text}
        if role == 'calls':
            message = {'role': 'assistant', 'content': None, 'tool_calls': _calls(text, field)}
        loss = loss_of(turn, f'{field}.')
        if loss is not None:
            message['loss'] = loss
        messages.append(message)
    return named(messages), tools_of(record)


def write(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A record of this form.

    Raises:
        ValueError: If the form has no place for something.
    """
    record: dict[str, Any] = {}
    turns: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        role, text = message['role'], plain_text(message, index)
        calls = calls_of(message, index)
        if role == 'system':
            record['system'] = text
            continue
        if calls and text:
            raise ValueError(f'message {index}: this form has no place for text beside calls')
        speaker = {'user': 'human', 'assistant': 'gpt', 'tool': 'observation'}[role]
        turn: dict[str, Any] = {'from': speaker, 'value': text}
        if calls:
            spelt = [{'name': name, 'arguments': given} for name, given in calls]
            turn = {
                'from': 'function_call',
                'value': to_json(spelt if len(spelt) > 1 else spelt[0]),
            }
        if is_context(message) and role == 'assistant':
            turn['loss'] = False
        turns.append(turn)
    record['conversations'] = turns
    if tools:
        record['tools'] = to_json(list(tools))
    return record


def _calls(text: str, field: str) -> list[dict[str, Any]]:
    """Calls as JSON with name and arguments: one, or a list."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f'{field}.value: no JSON ({error})') from None
    calls = found if isinstance(found, list) else [found]
    return [{'type': 'function', 'function': call} for call in calls]
