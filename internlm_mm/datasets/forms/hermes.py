"""Hermes: JSON between <tool_call> tags, functions between <tools> tags of the system's text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from internlm_mm.datasets.forms.fields import (
    Message,
    Parts,
    a_call,
    between,
    calling,
    calls_of,
    functions,
    literal,
    named,
    need,
    plain_text,
    speakers,
    to_json,
    tools_of,
    turns_of,
    unknown_speaker,
)

_ROLES = {
    'system': 'system',
    'human': 'user',
    'user': 'user',
    'gpt': 'assistant',
    'assistant': 'assistant',
    'tool': 'tool',
}
_TOOLS = ('<tools>', '</tools>')
_CALL = ('<tool_call>', '</tool_call>')
_RESULT = ('<tool_response>', '</tool_response>')
# The words around the list tell of the form: they are the template's business.
_PROTOCOL = 'You are a function calling AI model.'
_PROMPT = """\
You are a function calling AI model. You are provided with function signatures within \
<tools></tools> XML tags. You may call one or more functions to assist with the user query. \
Don't make assumptions about what values to plug into functions.
<tools>
{tools}
</tools>
For each function call return a json object with function name and arguments within \
<tool_call></tool_call> XML tags as follows:
<tool_call>
{"name": <function-name>, "arguments": <args-dict>}
</tool_call>
"""


def fits(record: Mapping[str, Any]) -> bool:
    """Whether a record is in this form."""
    return any(
        '<tool_call>' in text or (speaker == 'system' and '</tools>' in text)
        for speaker, text in speakers(record)
    )


def read(record: Mapping[str, Any]) -> Parts:
    """Messages and functions; what tells of the form is taken out of the system's text.

    Raises:
        ValueError: With the field that is wrong.
    """
    messages: list[Message] = []
    tools = tools_of(record)
    for field, speaker, text in turns_of(need(record, 'conversations'), 'conversations'):
        if speaker not in _ROLES:
            raise unknown_speaker(field, speaker, _ROLES)
        role = _ROLES[speaker]
        if role == 'system':
            text, listed = _outside(text)
            if listed:
                tools = tools or functions(_listed(listed, f'{field}.value, <tools>'))
            if text:
                messages.append({'role': role, 'content': text})
        elif role == 'tool':
            found = [inside for _, inside, _ in between(text, *_RESULT)]
            results = [one.removeprefix('\n').removesuffix('\n') for one in found] or [text]
            messages += [{'role': role, 'content': result} for result in results]
        elif role == 'assistant' and '<tool_call>' in text:
            messages.append(_calling(text, f'{field}.value'))
        else:
            messages.append({'role': role, 'content': text})
    return named(messages), tools


def write(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A record of this form.

    Raises:
        ValueError: If the form has no place for something.
    """
    turns: list[dict[str, str]] = []
    prompt = _PROMPT.replace('{tools}', '\n'.join(map(to_json, tools))) if tools else ''
    if prompt and messages[0]['role'] != 'system':
        turns.append({'from': 'system', 'value': prompt})
    for index, message in enumerate(messages):
        role, text = message['role'], plain_text(message, index)
        if role == 'system':
            turns.append({'from': 'system', 'value': prompt + text})
        elif role == 'tool':
            value = f'<tool_response>\n{text}\n</tool_response>'
            if turns[-1]['from'] == 'tool':
                turns[-1]['value'] += f'\n{value}'
            else:
                turns.append({'from': 'tool', 'value': value})
        else:
            calls = [
                f'<tool_call>\n{to_json({"name": name, "arguments": given})}\n</tool_call>'
                for name, given in calls_of(message, index)
            ]
            value = '\n'.join([text, *calls] if text else calls) if calls else text
            turns.append({'from': 'human' if role == 'user' else 'gpt', 'value': value})
    record: dict[str, Any] = {'conversations': turns}
    if tools:
        record['tools'] = to_json(list(tools))
    return record


def _calling(text: str, field: str) -> Message:
    """A message with calls."""
    start = text.index(_CALL[0])
    calls, place = [], start
    for begin, inside, end in between(text, *_CALL):
        if text[place:begin].strip():
            break
        called = literal(inside.strip(), f'{field}, <tool_call>')
        if not isinstance(called, dict) or 'name' not in called:
            raise ValueError(f'{field}, <tool_call>: an object with name and arguments')
        arguments = called.get('arguments', called.get('parameters')) or {}
        calls.append(a_call(called['name'], arguments))
        place = end
    if text[place:].strip():
        raise ValueError(f'{field}: something else behind or inside a <tool_call>')
    return calling(text[:start].removesuffix('\n'), calls)


def _listed(text: str, field: str) -> Iterator[Any]:
    """Functions as one list, or one a line."""
    if text.startswith('['):
        yield from literal(text, field)
        return
    for line in text.splitlines():
        if line.strip():
            yield literal(line, field)


def _outside(text: str) -> tuple[str, str]:
    """A system's text without the form's own words, and the list of functions in it."""
    found = [one for one in between(text, *_TOOLS) if one[1].strip()]
    if not found:
        return text, ''
    start, listed, stop = found[0]
    rest = text[:start] + ''.join(_TOOLS) + text[stop:]
    begin = rest.find(_PROTOCOL)
    if begin >= 0:
        end = max(rest.rfind(mark) + len(mark) for mark in (_CALL[1], _TOOLS[1]))
        rest = rest[:begin] + rest[end:].lstrip() if end > begin else rest
    return rest, listed.strip()
