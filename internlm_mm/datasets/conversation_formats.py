"""Records in the forms that conversations are published in -> OpenAI's messages."""

from __future__ import annotations

import json
import logging
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mmengine.logging import print_log

from internlm_mm.datasets.forms import (
    agent_flan,
    hermes,
    lagent,
    moss,
    ms_agent,
    sharegpt,
    toolbench,
    xlam,
)
from internlm_mm.datasets.forms.fields import (
    Parts,
    list_of,
    loss_of,
    need,
    parsed,
    system_of,
    text_of,
    tools_of,
)
from internlm_mm.datasets.records import Record, read_records
from internlm_mm.utils.suggest import did_you_mean, kind, misspelt_key


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
        path: A .json or .jsonl file, also with .gz, or a .parquet file.
        format: One of `FORMATS`; 'auto' is what the keys of the file's first record say, which is
            logged.
        keep_going: Whether a line that is no JSON gives an error in its place, too.

    Raises:
        ValueError: If there is no such format, none fits, or the file itself is damaged.
    """
    check_format(format)
    yield from read_formed(path, format, detect_format, _read, keep_going)


Formed = TypeVar('Formed')


def read_formed(
    path: str | Path,
    format: str,
    detect: Callable[[Mapping[str, Any]], str],
    read: Callable[[Record, str], Formed],
    keep_going: bool,
) -> Iterator[Formed | ValueError]:
    """What `read` makes of each record of a file, and in the place of one it refuses its error.

    Args:
        path: As in `read_examples`.
        format: The name of a form; 'auto' is what `detect` says of the first record.
        detect: The name of a record's form.
        read: What becomes of a record in a form.
        keep_going: As in `read_examples`.

    Raises:
        ValueError: If none fits, or the file itself is damaged.
    """
    damage: list[ValueError] = []
    on_damage = damage.append if keep_going else None
    for number, record in enumerate(read_records(path, on_damage=on_damage)):
        yield from damage
        damage.clear()
        try:
            if not isinstance(record.value, dict):
                raise ValueError(f'an object is expected, not {kind(record.value)}')
            if format == 'auto' and not number:
                format = detect(record.value)
                print_log(f'{path}: read as {format!r}', logger='current', level=logging.INFO)
        except ValueError as error:
            if format == 'auto':
                raise ValueError(f'{record.place}: {error}') from None
            yield ValueError(f'{record.place}: {error}')
            continue
        try:
            yield read(record, format)
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
    named = next((name for name, fits in _FITTING.items() if fits(record)), None)
    if named is not None:
        return named
    if 'conversations' in record:
        return 'sharegpt'
    if 'instruction' in record and 'output' in record:
        return 'alpaca'
    if _pair_of(record) is not None:
        return 'prompt_answer'
    pairs = ', '.join(f'{prompt} and {answer}' for prompt, answer in _PAIRS)
    raise ValueError(
        f'the keys {", ".join(map(repr, record))} are of no form of conversation that is known: '
        'messages; conversations; conversation; memory; meta_instruction and chat; '
        f'query, answers and tools; instruction and output; {pairs}.{misspelt_key(record, _KEYS)}'
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


def _openai(record: Mapping[str, Any]) -> Parts:
    messages = list_of(parsed(need(record, 'messages'), 'messages'), 'messages')
    old = record.get('functions')
    tools = tools_of({'tools': old} if old and not record.get('tools') else record)
    return [_weighed(message, index) for index, message in enumerate(messages)], tools


def _weighed(message: Any, index: int) -> dict[str, Any]:
    """A message with `loss` for the `weight` of OpenAI's files, and calls as they have them now."""
    if not isinstance(message, Mapping):
        raise ValueError(f'message {index}: an object with role and content, not {kind(message)}')
    read = {key: value for key, value in message.items() if value is not None}
    loss = loss_of(read, f'message {index}: ')
    read.pop('weight', None)
    if loss is not None:
        read['loss'] = loss
    if read.get('function_call') and 'tool_calls' not in read:  # of 2023
        read['tool_calls'] = [{'type': 'function', 'function': read.pop('function_call')}]
    if read.get('role') == 'function':
        read['role'] = 'tool'
    return read


def alpaca_prompt(record: Mapping[str, Any]) -> Parts:
    """What stands before an answer in Alpaca's form: `history`, `instruction` and `input`."""
    messages = system_of(record)
    for index, turn in enumerate(list_of(record.get('history') or [], 'history')):
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
            raise ValueError(
                f'history[{index}]: a question and an answer, not {reprlib.repr(turn)}'
            )
        for role, text in zip(('user', 'assistant'), turn, strict=True):
            messages.append({'role': role, 'content': text_of(text, f'history[{index}]')})
    question = text_of(need(record, 'instruction'), 'instruction')
    more = text_of(record.get('input') or '', 'input')
    messages.append({'role': 'user', 'content': f'{question}\n{more}' if more else question})
    return messages, tools_of(record)


def _alpaca(record: Mapping[str, Any]) -> Parts:
    messages, tools = alpaca_prompt(record)
    return [*messages, _answer(record, 'output')], tools


def _prompt_answer(record: Mapping[str, Any]) -> Parts:
    pair = _pair_of(record)
    if pair is None:
        pairs = ', '.join(f'{prompt} and {answer}' for prompt, answer in _PAIRS)
        raise ValueError(f'field missing, one pair of: {pairs}')
    question = {'role': 'user', 'content': text_of(record[pair[0]], pair[0])}
    return [*system_of(record), question, _answer(record, pair[1])], tools_of(record)


FORMATS: dict[str, Callable[[Mapping[str, Any]], Parts]] = {
    'messages': _openai,
    'alpaca': _alpaca,
    'sharegpt': sharegpt.read,
    'prompt_answer': _prompt_answer,
    'toolbench': toolbench.read,
    'ms_agent': ms_agent.read,
    'agent_flan': agent_flan.read,
    'xlam': xlam.read,
    'hermes': hermes.read,
    'moss': moss.read,
    'lagent': lagent.read,
}
"""Forms of a record: each function gives messages and functions, or a ValueError with the field."""

_FITTING: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    'toolbench': toolbench.fits,
    'ms_agent': ms_agent.fits,
    'hermes': hermes.fits,
    'agent_flan': agent_flan.fits,
    'xlam': xlam.fits,
    'moss': moss.fits,
    'lagent': lagent.fits,
}
# Forms that are told by more than a key: the first three look like ShareGPT's.

_PAIRS = (
    ('prompt', 'answer'),
    ('prompt', 'response'),
    ('prompt', 'completion'),
    ('question', 'answer'),
    ('query', 'response'),
    ('input', 'output'),
)

_KEYS = (
    *('messages', 'conversations', 'conversation', 'memory', 'meta_instruction', 'chat'),
    *('query', 'answers', 'tools', 'instruction', 'output', *chain.from_iterable(_PAIRS)),
)


def _pair_of(record: Mapping[str, Any]) -> tuple[str, str] | None:
    return next((pair for pair in _PAIRS if all(key in record for key in pair)), None)


def _answer(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    content = text_of(need(record, key), key)
    if not content.strip():
        raise ValueError(f'{key} is empty, and an empty answer would be learned')
    return {'role': 'assistant', 'content': content}


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
