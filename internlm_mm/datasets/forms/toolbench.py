"""ToolBench (ToolLLM): steps of ReAct, functions as Python writes them in the system's text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from internlm_mm.datasets.forms.fields import (
    Message,
    Parts,
    functions,
    list_of,
    literal,
    need,
    plain_text,
    speakers,
    turns_of,
    unknown_speaker,
)
from internlm_mm.datasets.forms.steps import read_step, step_message, write_step

_APIS = re.compile(r'(?:Specifically, )?you have access (?:to|of) the following APIs: *', re.I)
_LISTED = '\nSpecifically, you have access to the following APIs: '
_ASKED = re.compile(r'\n(.*)\nBegin!\n', re.DOTALL)
_ROLES = ('system', 'user', 'assistant', 'function')


def fits(record: Mapping[str, Any]) -> bool:
    """Whether a record is in this form."""
    said = dict(speakers(record))
    return 'function' in said or bool(_APIS.search(said.get('system', '')))


def read(record: Mapping[str, Any]) -> Parts:
    """Messages and functions.

    The list of functions is taken out of the system's text. `Finish` is a call like others; the
    last one has no result. 'Begin!' behind a question goes.

    Raises:
        ValueError: With the field that is wrong.
    """
    messages: list[Message] = []
    tools: list[dict[str, Any]] = []
    for field, speaker, text in turns_of(need(record, 'conversations'), 'conversations'):
        if speaker not in _ROLES:
            raise unknown_speaker(field, speaker, _ROLES)
        message: Message = {'role': speaker, 'content': text}
        if speaker == 'system':
            found = _APIS.search(text)
            if found is not None:
                listed = literal(text[found.end() :], f'{field}.value, APIs')
                tools = functions(list_of(listed, f'{field}.value, APIs'))
                message['content'] = text[: found.start()].rstrip()
        elif speaker == 'user':
            asked = _ASKED.fullmatch(text)
            message['content'] = asked[1] if asked is not None else text
        elif speaker == 'function':
            message['role'] = 'tool'
        elif (step := read_step(text)) is not None:
            message = step_message(step, f'{field}.value')
        messages.append(message)
    return messages, tools


def write(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A record of this form.

    Raises:
        ValueError: If the form has no place for something.
    """
    turns = []
    listed = [tool['function'] for tool in tools]
    if listed and messages[0]['role'] != 'system':
        turns.append({'from': 'system', 'value': _LISTED + str(listed)})
    for index, message in enumerate(messages):
        text = plain_text(message, index)
        role = message['role']
        if role == 'system':
            text += _LISTED + str(listed) if listed else ''
        elif role == 'user':
            text = f'\n{text}\nBegin!\n'
        elif role == 'assistant':
            text = write_step(message, index)
            text = f'\n{text}' if message.get('tool_calls') else text
        turns.append({'from': 'function' if role == 'tool' else role, 'value': text})
    return {'conversations': turns}
