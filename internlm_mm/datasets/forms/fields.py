"""Fields of records, looked over while they are read, and what forms have in common."""

from __future__ import annotations

import ast
import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from internlm_mm.datasets.records import parse_json
from internlm_mm.utils.suggest import did_you_mean, kind

Message = dict[str, Any]
Parts = tuple[list[Message], list[dict[str, Any]]]
"""Messages and functions in OpenAI's form."""


def need(record: Mapping[str, Any], key: str) -> Any:
    """A field that must be there.

    Raises:
        ValueError: If it is not, or is null.
    """
    if key in record and record[key] is None:
        raise ValueError(f'field {key!r} is null')
    if key not in record:
        raise ValueError(f'field {key!r} is missing.{did_you_mean(key, record)}')
    return record[key]


def text_of(value: Any, field: str) -> str:
    """A text.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(value, str):
        raise ValueError(f'{field}: a text, not {kind(value)}')
    return value


def list_of(value: Any, field: str) -> list[Any]:
    """A list.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(value, list):
        raise ValueError(f'{field}: a list, not {kind(value)}')
    return value


def loss_of(turn: Mapping[str, Any], field: str) -> bool | None:
    """What `loss`, or OpenAI's `weight`, says of a turn; None where there is neither.

    Args:
        turn: Its fields; 0 and 1 are as good as false and true.
        field: In front of the names, for messages: 'message 1: ' or 'conversations[1].'.

    Raises:
        ValueError: If one is something else, or the two contradict each other.
    """
    loss, weight = turn.get('loss'), turn.get('weight')
    for key, value, valid in (('loss', loss, 'true or false'), ('weight', weight, '0 or 1')):
        if value not in (None, False, True):
            raise ValueError(f'{field}{key} {reprlib.repr(value)}: {valid}')
    if loss is not None and weight is not None and loss != weight:
        raise ValueError(f'{field}loss {loss!r} beside weight {weight!r}: they contradict')
    value = weight if loss is None else loss
    return None if value is None else bool(value)


def is_context(message: Mapping[str, Any]) -> bool:
    """Whether a message says that it is not learned: `loss` is False, or 0."""
    return message.get('loss') in (False,)


def parsed(value: Any, field: str) -> Any:
    """What a column of text holds as JSON; other values as they are.

    Raises:
        ValueError: If a text is no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value) if value.strip() else []
    except ValueError as error:
        raise ValueError(f'{field}: no JSON ({error})') from None


def literal(text: str, field: str) -> Any:
    """What a text holds as JSON, or as Python writes lists and dicts; nothing is run.

    Raises:
        ValueError: If it holds neither, or something that JSON does not have.
    """
    try:
        return parse_json(text)
    except ValueError as error:
        reason = error
    try:
        value = ast.literal_eval(text.strip())
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        shown = reprlib.repr(text)
        raise ValueError(f'{field}: neither JSON ({reason}) nor a literal: {shown}') from None
    return value


def tools_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Functions of a record, which may be JSON text, and may lack the outer object."""
    return functions(list_of(parsed(record.get('tools') or [], 'tools'), 'tools'))


def system_of(record: Mapping[str, Any]) -> list[Message]:
    """The system's message of a record that has its text in a field of its own."""
    text = text_of(record.get('system') or '', 'system')
    return [{'role': 'system', 'content': text}] if text else []


def functions(tools: Iterable[Any]) -> list[dict[str, Any]]:
    """Functions in OpenAI's form, of those that may lack the outer object."""
    return [
        {'type': 'function', 'function': tool}
        if isinstance(tool, Mapping) and 'name' in tool and 'function' not in tool
        else tool
        for tool in tools
    ]


def turns_of(value: Any, field: str) -> Iterator[tuple[str, str, str]]:
    """Turns of ShareGPT's form: field, speaker and text of each; columns are turned into rows.

    Raises:
        ValueError: If something is no turn.
    """
    if isinstance(value, Mapping) and isinstance(value.get('from'), list):
        columns = (value['from'], list_of(value.get('value'), f'{field}.value'))
        if len(columns[0]) != len(columns[1]):
            raise ValueError(f'{field}: from and value of different lengths')
        value = [{'from': speaker, 'value': text} for speaker, text in zip(*columns, strict=True)]
    for index, turn in enumerate(list_of(value, field)):
        place = f'{field}[{index}]'
        if not isinstance(turn, Mapping):
            raise ValueError(f'{place}: an object with from and value, not {kind(turn)}')
        speaker = text_of(turn.get('from', turn.get('role')), f'{place}.from')
        yield place, speaker, text_of(turn.get('value', turn.get('content')), f'{place}.value')


def speakers(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Speakers and texts of a record in ShareGPT's form, as far as there are any; never raises."""
    value = record.get('conversations')
    if isinstance(value, Mapping):
        pairs: Iterable[Any] = zip(value.get('from') or (), value.get('value') or (), strict=False)
    else:
        turns = value if isinstance(value, list) else ()
        pairs = ((t.get('from'), t.get('value')) for t in turns if isinstance(t, Mapping))
    yield from ((s, t) for s, t in pairs if isinstance(s, str) and isinstance(t, str))


def unknown_speaker(field: str, speaker: str, known: Iterable[str]) -> ValueError:
    """What is said of a speaker that a form does not have."""
    return ValueError(
        f'{field}.from {reprlib.repr(speaker)} is none.{did_you_mean(speaker, known)}'
    )


def a_call(name: Any, arguments: Any, call_id: str | None = None) -> dict[str, Any]:
    """A call in OpenAI's form."""
    call = {'type': 'function', 'function': {'name': name, 'arguments': arguments}}
    return call if call_id is None else {'id': call_id, **call}


def calling(content: str, calls: Sequence[dict[str, Any]]) -> Message:
    """An assistant's message with calls."""
    return {'role': 'assistant', 'content': content, 'tool_calls': list(calls)}


def between(text: str, begin: str, end: str) -> Iterator[tuple[int, str, int]]:
    """What stands between two marks: where the first begins, the inside, where the last ends."""
    start = text.find(begin)
    while start >= 0:
        stop = text.find(end, start + len(begin))
        if stop < 0:
            return
        yield start, text[start + len(begin) : stop], stop + len(end)
        start = text.find(begin, stop + len(end))


def named(messages: list[Message]) -> list[Message]:
    """Results of several calls get the names of their functions, for they stand in their order."""
    waiting: list[Any] = []
    for message in messages:
        if message['role'] == 'tool' and waiting:
            name = waiting.pop(0)
            if isinstance(name, str) and not message.get('tool_call_id'):
                message.setdefault('name', name)
        calls = message.get('tool_calls') or ()
        if len(calls) > 1:
            functions = (call.get('function') for call in calls)
            waiting = [f.get('name') if isinstance(f, Mapping) else '' for f in functions]
    return messages


def calls_of(message: Mapping[str, Any], index: int) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of a message's calls.

    Raises:
        ValueError: If arguments are no object.
    """
    found = []
    for number, call in enumerate(message.get('tool_calls') or ()):
        field = f'message {index}: tool_calls[{number}].function'
        arguments = parsed(call['function'].get('arguments') or {}, f'{field}.arguments')
        if not isinstance(arguments, dict):
            raise ValueError(f'{field}.arguments: an object, not {kind(arguments)}')
        found.append((call['function']['name'], arguments))
    return found


def one_call(message: Mapping[str, Any], index: int) -> tuple[str, dict[str, Any]] | None:
    """The call of a message, where a form has one a turn.

    Raises:
        ValueError: If there are several.
    """
    calls = calls_of(message, index)
    if len(calls) > 1:
        raise ValueError(f'message {index}: this form has one call a turn, not {len(calls)}')
    return calls[0] if calls else None


def plain_text(message: Mapping[str, Any], index: int) -> str:
    """A message's text, for forms that have nothing else in the place.

    Raises:
        ValueError: If it has parts that are no text.
    """
    content = message.get('content') or ''
    if isinstance(content, str):
        return content
    texts = [part.get('text') for part in content if isinstance(part, Mapping)]
    if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f'message {index}: this form has texts only, and no images')
    return ''.join(map(str, texts))


def to_json(value: object) -> str:
    """JSON in one line, with letters of every script."""
    return json.dumps(value, ensure_ascii=False)
