"""Records in the forms that conversations are published in -> OpenAI's messages."""

from __future__ import annotations

import json
import logging
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.logging import print_log

from internlm_mm.datasets.records import Record, read_records
from internlm_mm.utils.suggest import did_you_mean


class Example(NamedTuple):
    """One conversation.

    Attributes:
        messages: In OpenAI's form, as `ChatTemplate.encode` takes them.
        tools: The functions that may be called, in OpenAI's form.
        place: `file:line` of its record.
        format: Which of `FORMATS` it was read as.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    place: str
    format: str


def read_examples(
    path: str | Path, format: str = 'auto', *, keep_going: bool = False
) -> Iterator[Example | ValueError]:
    """Conversations of one file, in order, and in the place of each that is malformed its error.

    Args:
        path: A .json, .jsonl, .jsonl.gz or .parquet file.
        format: One of `FORMATS`; 'auto' is what the keys of the file's first record say, which is
            logged.
        keep_going: Whether a line that is no JSON gives an error in its place, too.

    Raises:
        ValueError: If there is no such format, none fits, or the file itself is damaged.
    """
    if format != 'auto':
        check_format(format)
    damage: list[ValueError] = []
    on_damage = damage.append if keep_going else None
    for number, record in enumerate(read_records(path, on_damage=on_damage)):
        yield from damage
        damage.clear()
        try:
            if not isinstance(record.value, dict):
                raise ValueError(f'an object is expected, not {_kind(record.value)}')
            if format == 'auto' and not number:
                format = detect_format(record.value)
                print_log(f'{path}: read as {format!r}', logger='current', level=logging.INFO)
        except ValueError as error:
            if format == 'auto':
                raise ValueError(f'{record.place}: {error}') from None
            yield ValueError(f'{record.place}: {error}')
            continue
        try:
            yield _read(record, format)
        except ValueError as error:
            yield ValueError(f'{record.place}, {error}')
    yield from damage


def check_format(format: str) -> None:
    """Refuse a format that there is not.

    Raises:
        ValueError: With the nearest name.
    """
    known = ('auto', *FORMATS)
    if format not in known:
        raise ValueError(
            f'format={format!r} is none of {", ".join(known)}.{did_you_mean(format, known)}'
        )


def detect_format(record: Mapping[str, Any]) -> str:
    """Which of `FORMATS` a record has, by its keys.

    Raises:
        ValueError: If it is none; names the keys that there are, and those that are looked for.
    """
    if 'messages' in record:
        return 'messages'
    if 'conversations' in record:
        return 'sharegpt'
    if 'instruction' in record and 'output' in record:
        return 'alpaca'
    if _pair_of(record) is not None:
        return 'prompt_answer'
    pairs = ', '.join(f'{prompt} and {answer}' for prompt, answer in _PAIRS)
    raise ValueError(
        f'the keys {", ".join(map(repr, record))} are of no form of conversation that is known: '
        f'messages; conversations; instruction and output; {pairs}'
    )


def _read(record: Record, format: str) -> Example:
    if record.path.name.lower().endswith('.parquet'):
        for key, value in record.value.items():
            refuse_filled(value, key)
    messages, tools = FORMATS[format](record.value)
    for index, message in enumerate(messages):
        try:
            json.dumps(message, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # JSON may spell half a character
            raise ValueError(f'message {index}: the text has a lone surrogate') from None
    return Example(messages, tools, record.place, format)


def _openai(record: Mapping[str, Any]) -> _Parts:
    messages = _list(_parsed(_need(record, 'messages'), 'messages'), 'messages')
    return [_weighed(message, index) for index, message in enumerate(messages)], _tools(record)


def _weighed(message: Any, index: int) -> dict[str, Any]:
    """A message with `loss` where OpenAI's fine-tuning files have `weight`."""
    if not isinstance(message, Mapping):
        raise ValueError(f'message {index}: an object with role and content, not {_kind(message)}')
    read = {key: value for key, value in message.items() if value is not None}
    if 'weight' in read:
        weight = read.pop('weight')
        if weight not in (0, 1):
            raise ValueError(f'message {index}: weight {reprlib.repr(weight)}: 0 or 1')
        read.setdefault('loss', bool(weight))
    return read


def _alpaca(record: Mapping[str, Any]) -> _Parts:
    messages = _system(record)
    for index, turn in enumerate(_list(record.get('history') or [], 'history')):
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
            raise ValueError(
                f'history[{index}]: a question and an answer, not {reprlib.repr(turn)}'
            )
        for role, text in zip(('user', 'assistant'), turn, strict=True):
            messages.append({'role': role, 'content': _text(text, f'history[{index}]')})
    question = _text(_need(record, 'instruction'), 'instruction')
    more = _text(record.get('input') or '', 'input')
    messages.append({'role': 'user', 'content': f'{question}\n{more}' if more else question})
    messages.append(_answer(record, 'output'))
    return messages, _tools(record)


def _sharegpt(record: Mapping[str, Any]) -> _Parts:
    messages = _system(record)
    turns = _list(_parsed(_need(record, 'conversations'), 'conversations'), 'conversations')
    for index, turn in enumerate(turns):
        field = f'conversations[{index}]'
        if not isinstance(turn, Mapping):
            raise ValueError(f'{field}: an object with from and value, not {_kind(turn)}')
        speaker = turn.get('from', turn.get('role'))
        role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise ValueError(f'{field}.from {reprlib.repr(speaker)} is none.{_near(speaker)}')
        text = _text(turn.get('value', turn.get('content')), f'{field}.value')
        message: dict[str, Any] = {'role': role, 'content': text}
        if role == 'calls':
            message = {'role': 'assistant', 'content': None, 'tool_calls': _calls(text, field)}
        loss = turn.get('loss', turn.get('weight'))
        if loss is not None:
            if loss not in (0, 1):
                raise ValueError(f'{field}.loss {reprlib.repr(loss)}: true or false')
            message['loss'] = bool(loss)
        messages.append(message)
    return messages, _tools(record)


def _prompt_answer(record: Mapping[str, Any]) -> _Parts:
    pair = _pair_of(record)
    if pair is None:
        pairs = ', '.join(f'{prompt} and {answer}' for prompt, answer in _PAIRS)
        raise ValueError(f'field missing, one pair of: {pairs}')
    question = {'role': 'user', 'content': _text(record[pair[0]], pair[0])}
    return [*_system(record), question, _answer(record, pair[1])], _tools(record)


_Parts = tuple[list[dict[str, Any]], list[dict[str, Any]]]

FORMATS: dict[str, Callable[[Mapping[str, Any]], _Parts]] = {
    'messages': _openai,
    'alpaca': _alpaca,
    'sharegpt': _sharegpt,
    'prompt_answer': _prompt_answer,
}
"""Forms of a record: each function gives messages and functions, or a ValueError with the field."""

_PAIRS = (
    ('prompt', 'answer'),
    ('prompt', 'response'),
    ('prompt', 'completion'),
    ('question', 'answer'),
    ('query', 'response'),
    ('input', 'output'),
)
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


def _near(speaker: Any) -> str:
    return did_you_mean(str(speaker), _SPEAKERS)


def _pair_of(record: Mapping[str, Any]) -> tuple[str, str] | None:
    return next((pair for pair in _PAIRS if all(key in record for key in pair)), None)


def _system(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    text = _text(record.get('system') or '', 'system')
    return [{'role': 'system', 'content': text}] if text else []


def _answer(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {'role': 'assistant', 'content': _text(_need(record, key), key)}


def _calls(text: str, field: str) -> list[dict[str, Any]]:
    """Calls as ShareGPT's `function_call` spells them: JSON with name and arguments."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f'{field}.value: no JSON ({error})') from None
    calls = found if isinstance(found, list) else [found]
    return [{'type': 'function', 'function': call} for call in calls]


def _tools(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Functions of a record, which may be JSON text, and may lack the outer object."""
    tools = _list(_parsed(record.get('tools') or [], 'tools'), 'tools')
    bare = [
        isinstance(tool, Mapping) and 'name' in tool and 'function' not in tool for tool in tools
    ]
    return [
        {'type': 'function', 'function': tool} if is_bare else tool
        for tool, is_bare in zip(tools, bare, strict=True)
    ]


def _parsed(value: Any, field: str) -> Any:
    """What a column of text holds as JSON; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else []
    except ValueError as error:
        raise ValueError(f'{field}: no JSON ({error})') from None


def refuse_filled(value: Any, field: str) -> None:
    """Refuse objects of any keys in parquet, which gives every row the keys of all rows."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            inside = f'{field}.{key}'
            if key in ('arguments', 'parameters') and isinstance(item, Mapping):
                column = field.partition('[')[0].partition('.')[0]
                raise ValueError(
                    f'{inside}: parquet gives this object the keys of those in all other rows; '
                    f'store the column {column!r} as JSON text'
                )
            refuse_filled(item, inside)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            refuse_filled(item, f'{field}[{index}]')


def _need(record: Mapping[str, Any], key: str) -> Any:
    if record.get(key) is None:
        raise ValueError(f'field {key!r} is missing.{did_you_mean(key, record)}')
    return record[key]


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f'{field}: a text, not {_kind(value)}')
    return value


def _list(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f'{field}: a list, not {_kind(value)}')
    return value


def _kind(value: object) -> str:
    return type(value).__name__
