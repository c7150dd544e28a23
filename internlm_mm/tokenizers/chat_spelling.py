"""What templates are made of: strings with fields and marks, and how functions are used."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from internlm_mm.tokenizers.base import Tokenizer
from internlm_mm.tokenizers.chat_messages import CODE_TOOL

BOS, EOS = 'the bos token', 'the eos token'
"""Stand for the tokenizer's own, whatever they are called."""

Listing = Literal['functions', 'lines', 'indented', 'described']


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a conversation.

    Attributes:
        text: How it is spelt.
        token: The token that it is, if the tokenizer has it; None for plain text.
        answer: Whether the model writes it.
        trained: Whether there is a loss on it; only on what the model writes.
    """

    text: str
    token: str | None = None
    answer: bool = False
    trained: bool = False


class Encoded(NamedTuple):
    """Tokens, and for each whether there is a loss on it."""

    ids: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """How functions are declared, called and answered for.

    Attributes:
        declaration: Tells the model of its functions: '{tools}' is their list, '{names}' their
            names with commas.
        listing: How they are listed: 'functions' is one JSON list; 'lines' and 'indented' are a
            JSON object each; 'described' is a line with name, description and parameters each.
        turn: What is before and after the declaration, where it is a turn of its own; None where
            it is part of the system's text.
        first: Whether the declaration stands before the system's own text.
        call: '{name}' and '{arguments}', as JSON, of a call.
        before_call: Between an assistant's text and its first call.
        between_calls: Between two calls.
        parallel: Whether there may be several calls in one turn.
        code: '{code}' of a call of the function `python`, where that has a form of its own.
        code_name: What that function is called in `declaration`.
        code_turn: What is before and after its description, where that has a turn of its own.
        thought: Around an assistant's text before a call, and around its `reasoning_content`.
        answer: Before the text of an answer, in a conversation with functions.
        result: Before and after what a function gave.
        code_result: The same for `python`; None for `result`.
        results: Before and after all results that follow one another.
    """

    declaration: str
    listing: Listing
    turn: tuple[str, str] | None = None
    first: bool = False
    call: str
    before_call: str = ''
    between_calls: str = ''
    parallel: bool = True
    code: str | None = None
    code_name: str = CODE_TOOL
    code_turn: tuple[str, str] | None = None
    thought: tuple[str, str] | None = None
    answer: str = ''
    result: tuple[str, str]
    code_result: tuple[str, str] | None = None
    results: tuple[str, str] = ('', '')


_FIELD = re.compile(r'\{(as_name|name|arguments|code|tools|names)\}')


def split_fields(spelling: str) -> Iterator[tuple[str, str]]:
    """Cut a template's string at its fields: pairs (text, '') and ('', name of the field)."""
    for number, part in enumerate(_FIELD.split(spelling)):
        if part:
            yield ('', part) if number % 2 else (part, '')


def as_name(name: str) -> str:
    """How a message's name stands behind its role."""
    return f' name={name}' if name else ''


def to_json(value: object) -> str:
    """JSON as the `tojson` of Hugging Face's chat templates writes it."""
    return json.dumps(value, ensure_ascii=False)


def list_tools(tools: Sequence[Mapping[str, Any]], form: ToolFormat) -> str:
    """What is put for '{tools}'; `chat_jinja.py` says the same in Jinja."""
    functions = [tool['function'] for tool in tools]
    if form.listing == 'functions':
        return to_json(functions)
    if form.listing == 'lines':
        return '\n'.join(map(to_json, tools))
    if form.listing == 'indented':
        return '\n\n'.join(json.dumps(tool, ensure_ascii=False, indent=4) for tool in tools)
    return '\n'.join(
        f'{listed_name(function, form)}: {function.get("description", "")}'
        + (f' {to_json(function["parameters"])}' if function.get('parameters') else '')
        for function in functions
    )


def listed_name(function: Mapping[str, Any], form: ToolFormat) -> str:
    return form.code_name if function['name'] == CODE_TOOL else function['name']


def encode_plain(tokenizer: Tokenizer, text: str, reserved: Sequence[str]) -> list[int]:
    """Tokens of a text in which nothing is special, whatever it spells.

    Args:
        tokenizer: Which may find tokens of its own in a text.
        text: What somebody wrote.
        reserved: Spellings of tokens that must not come out of it; each is cut in two.
    """
    if not any(spelling in text for spelling in reserved):
        return tokenizer.encode(text)
    found = re.finditer(f'(?={"|".join(map(re.escape, reserved))})', text)
    cuts = [0, *(match.start() + 1 for match in found), len(text)]
    ids = []
    for start, end in itertools.pairwise(cuts):
        ids += tokenizer.encode(text[start:end])
    return ids
