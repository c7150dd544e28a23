"""Records of one form -> records of another, with nothing lost."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from internlm_mm.datasets.conversation_formats import FORMATS, check_format, detect_format
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
from internlm_mm.datasets.forms.fields import Message, Parts
from internlm_mm.datasets.records import read_records
from internlm_mm.tokenizers.chat_messages import Conversation, read_conversation
from internlm_mm.utils.suggest import did_you_mean, kind

SOURCE = 'source'
"""Key of a converted record: the form it had, and those fields that the form alone can hold."""
_SHOWN = 5


def _write_messages(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    record: dict[str, Any] = {'messages': list(messages)}
    return record | {'tools': list(tools)} if tools else record


WRITERS: dict[str, Callable[[Sequence[Message], Sequence[Mapping[str, Any]]], dict[str, Any]]] = {
    'messages': _write_messages,
    'sharegpt': sharegpt.write,
    'toolbench': toolbench.write,
    'ms_agent': ms_agent.write,
    'agent_flan': agent_flan.write,
    'xlam': xlam.write,
    'hermes': hermes.write,
    'moss': moss.write,
    'lagent': lagent.write,
}
"""Forms that are written: each function makes a record, or a ValueError with what has no place."""

_FIELDS: dict[str, tuple[str, ...]] = {
    'messages': ('messages', 'tools', 'functions'),
    'alpaca': ('instruction', 'input', 'output', 'history', 'system', 'tools'),
    'sharegpt': ('conversations', 'system', 'tools'),
    'prompt_answer': ('prompt', 'answer', 'response', 'completion', 'question', 'query', 'input',
                      'output', 'system', 'tools'),
    'toolbench': ('conversations',),
    'ms_agent': ('conversations',),
    'agent_flan': ('conversation',),
    'xlam': ('query', 'answers', 'tools'),
    'hermes': ('conversations', 'tools'),
    'moss': ('meta_instruction', 'num_turns', 'chat'),
    'lagent': ('memory', 'tools'),
}  # fmt: skip


def convert_record(record: Mapping[str, Any], form: str, to: str = 'messages') -> dict[str, Any]:
    """One record in another form.

    Fields that neither form knows stay. What the other form cannot hold (the wording of a list of
    functions, a plugin's address) is put under `SOURCE`; it is used where a record goes back, as
    long as its messages are still the same.

    Args:
        record: The record.
        form: Its form, one of `FORMATS`.
        to: The other form, one of `WRITERS`.

    Raises:
        ValueError: If the record is malformed, or the other form has no place for something.
    """
    parts = _looked_over(FORMATS[form](record))
    rest = {key: value for key, value in record.items() if key not in (*_FIELDS[form], SOURCE)}
    source = record.get(SOURCE)
    if isinstance(source, Mapping) and source.get('form') == to:
        fields = {key: value for key, value in source.items() if key != 'form'}
        if not _difference(_looked_over(FORMATS[to](fields)), parts):
            return {**fields, **rest}
    written = WRITERS[to](_in_order(parts[0]), parts[1])
    try:
        difference = _difference(_looked_over(FORMATS[to](written)), parts)
    except ValueError as error:  # what it spells is something else there
        raise ValueError(f'the form {to!r} has no place for it: {error}') from None
    if difference:
        raise ValueError(f'{difference}: the form {to!r} has no place for it')
    fields = {key: record[key] for key in _FIELDS[form] if key in record}
    if isinstance(source, Mapping):
        rest[SOURCE] = source  # of a third form
    elif form != 'messages' and not _comes_back(form, written, to, fields):
        rest[SOURCE] = {'form': form, **fields}
    return {**written, **rest}


@dataclass
class Converted:
    """What became of records.

    Attributes:
        written: Records that were written.
        forms: How many of them had which form.
        skipped: Malformed ones that were left out.
        messages: The first errors.
    """

    written: int = 0
    forms: dict[str, int] = field(default_factory=dict)
    skipped: int = 0
    messages: list[str] = field(default_factory=list)


def convert_files(
    paths: Iterable[str | Path],
    output: str | Path,
    *,
    form: str = 'auto',
    to: str = 'messages',
    on_error: str = 'raise',
    overwrite: bool = False,
) -> Converted:
    """Write the records of files as lines of one file, which appears when it is whole.

    Args:
        paths: .json, .jsonl, .jsonl.gz or .parquet files.
        output: A .jsonl file.
        form: Of the records; 'auto' is what the keys of each file's first record say.
        to: One of `WRITERS`.
        on_error: 'raise' stops at the first record that cannot be converted; 'skip' leaves them
            out.
        overwrite: Replace a file that is there already.

    Raises:
        FileNotFoundError: If there is no such file.
        FileExistsError: If `output` exists and `overwrite` is not set.
        ValueError: If there is no such form, or a record cannot be converted; names file and line.
    """
    check_format(form)
    if to not in WRITERS:
        raise ValueError(f'to={to!r} is none of {", ".join(WRITERS)}.{did_you_mean(to, WRITERS)}')
    output = Path(output)
    if output.suffix != '.jsonl':
        raise ValueError(f'{output}: a file of lines is written, whose name ends in .jsonl')
    if output.exists() and not overwrite:
        raise FileExistsError(f'{output} exists; give another output, or --overwrite')
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f'{output.name}.tmp')
    counts = Converted()
    try:
        with open(unfinished, 'w', encoding='utf-8') as file:
            for path in paths:
                for line in _lines(Path(path), form, to, on_error, counts):
                    file.write(f'{line}\n')
        os.replace(unfinished, output)
    finally:
        unfinished.unlink(missing_ok=True)
    return counts


def _lines(path: Path, form: str, to: str, on_error: str, counts: Converted) -> Iterable[str]:
    for record in read_records(path):
        try:
            if not isinstance(record.value, dict):
                raise ValueError(f'an object is expected, not {kind(record.value)}')
            form = detect_format(record.value) if form == 'auto' else form
            converted = convert_record(record.value, form, to)
            line = json.dumps(converted, ensure_ascii=False, allow_nan=False)
            line.encode()
        except ValueError as error:
            if on_error == 'raise':
                raise ValueError(f'{record.place}, {error}') from None
            counts.skipped += 1
            counts.messages += [f'{record.place}, {error}'] * (len(counts.messages) < _SHOWN)
            continue
        counts.written += 1
        counts.forms[form] = counts.forms.get(form, 0) + 1
        yield line


def _looked_over(parts: Parts) -> Parts:
    """The parts of a record, unless they are no conversation."""
    read_conversation(*parts)
    return parts


def _in_order(messages: Sequence[Message]) -> list[Message]:
    """Messages with the results of calls in the order of the calls, for forms without ids."""
    ordered: list[Message] = []
    ids: list[Any] = []
    for is_result, group in itertools.groupby(messages, lambda m: m['role'] == 'tool'):
        together = list(group)
        known = [message.get('tool_call_id') for message in together]
        if is_result and None not in known and set(known) <= set(ids):
            together.sort(key=lambda message: ids.index(message['tool_call_id']))
        ids = [call.get('id') for call in together[-1].get('tool_calls') or ()]
        ordered += together
    return ordered


def _difference(found: Parts, expected: Parts) -> str:
    """What differs between two conversations first; '' if nothing does."""
    ours, theirs = (_plain(read_conversation(_in_order(m), t)) for m, t in (found, expected))
    for index, (one, other) in enumerate(zip(ours.messages, theirs.messages, strict=False)):
        for name in ('role', 'name', 'content', 'thought', 'calls', 'loss'):
            if getattr(one, name) != getattr(other, name):
                return f'message {index}, {name}'
    if len(ours.messages) != len(theirs.messages):
        return f'message {min(len(ours.messages), len(theirs.messages))}'
    return '' if ours.tools == theirs.tools else 'tools'


def _plain(conversation: Conversation) -> Conversation:
    """A conversation without ids of calls."""
    messages = (
        replace(message, calls=tuple(replace(call, id=None) for call in message.calls))
        for message in conversation.messages
    )
    return replace(conversation, messages=tuple(messages))


def _comes_back(form: str, written: Mapping[str, Any], to: str, fields: Mapping[str, Any]) -> bool:
    """Whether a record is written again, to the letter, from what it was converted to."""
    try:
        return WRITERS[form](*FORMATS[to](written)) == fields
    except (KeyError, ValueError):
        return False
