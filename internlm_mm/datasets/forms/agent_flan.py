"""Agent-FLAN: plain turns with a loss each, some of them steps of ReAct."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from internlm_mm.datasets.forms.fields import (
    Message,
    Parts,
    list_of,
    loss_of,
    need,
    plain_text,
    text_of,
)
from internlm_mm.datasets.forms.steps import read_step, step_message, write_step
from internlm_mm.utils.suggest import did_you_mean, kind

_ROLES = ('system', 'user', 'assistant', 'function', 'environment', 'tool')


def fits(record: Mapping[str, Any]) -> bool:
    """Whether a record is in this form."""
    return isinstance(record.get('conversation'), list)


def read(record: Mapping[str, Any]) -> Parts:
    """Messages; functions are described in texts only, so there are none.

    A step with JSON behind 'Action Input:' is a call, and the turn behind it the result. Steps
    with anything else stay text.

    Raises:
        ValueError: With the field that is wrong.
    """
    messages: list[Message] = []
    waits = False
    for index, turn in enumerate(list_of(need(record, 'conversation'), 'conversation')):
        field = f'conversation[{index}]'
        if not isinstance(turn, Mapping):
            raise ValueError(f'{field}: an object with role and content, not {kind(turn)}')
        role = turn.get('role')
        if role not in _ROLES:
            hint = did_you_mean(str(role), _ROLES)
            raise ValueError(f'{field}.role {reprlib.repr(role)} is none.{hint}')
        text = text_of(turn.get('content'), f'{field}.content')
        message: Message = {'role': role, 'content': text}
        if role == 'assistant':
            message = _answer(text)
            if loss_of(turn, f'{field}.') is False:
                message['loss'] = False
        elif waits or role not in ('system', 'user'):
            message['role'] = 'tool' if waits else 'user'
        waits = bool(message.get('tool_calls'))
        messages.append(message)
    return messages, []


def write(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A record of this form.

    Raises:
        ValueError: If the form has no place for something.
    """
    if tools:
        raise ValueError('tools: this form has no place for them, but in the text of its messages')
    turns = []
    for index, message in enumerate(messages):
        answers = message['role'] == 'assistant'
        turns.append(
            {
                'role': 'user' if message['role'] == 'tool' else message['role'],
                'content': write_step(message, index) if answers else plain_text(message, index),
                'loss': answers and message.get('loss', True),
            }
        )
    return {'conversation': turns}


def _answer(text: str) -> Message:
    step = read_step(text)
    if step is not None and step.input.startswith('{'):
        try:
            return step_message(step, '')
        except ValueError:  # a program, or another language: text
            pass
    return {'role': 'assistant', 'content': text}
