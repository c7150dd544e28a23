"""Steps in the manner of ReAct, as data sets spell them: Thought, Action, Action Input."""

from __future__ import annotations

import re
from typing import NamedTuple

from internlm_mm.datasets.forms.fields import (
    Message,
    a_call,
    calling,
    literal,
    one_call,
    plain_text,
    to_json,
)

_STEP = re.compile(
    r'\s*(?:Thought:[ \t]?(?P<thought>.*?)\s*?\n)?\s*?Action:[ \t]*(?P<name>[^\n]*?)[ \t]*\n'
    r'\s*?Action Input:[ \t]*(?P<input>.*)',
    re.DOTALL,
)


class Step(NamedTuple):
    """A thought, and the call that follows it."""

    thought: str
    name: str
    input: str


def read_step(text: str) -> Step | None:
    """The step that a text is; None if it is none."""
    match = _STEP.fullmatch(text)
    if match is None or not match['name']:
        return None
    return Step(match['thought'] or '', match['name'], match['input'].strip())


def step_message(step: Step, field: str) -> Message:
    """A step as an assistant's message.

    Raises:
        ValueError: If the input is no object.
    """
    arguments = literal(step.input, f'{field}, Action Input') if step.input else {}
    if not isinstance(arguments, dict):
        raise ValueError(f'{field}, Action Input: an object, not {type(arguments).__name__}')
    return calling(step.thought, [a_call(step.name, arguments)])


def write_step(message: Message, index: int) -> str:
    """Text of an assistant's message.

    Raises:
        ValueError: If there are several calls.
    """
    called = one_call(message, index)
    text = plain_text(message, index)
    if called is None:
        return text
    name, arguments = called
    return f'Thought: {text}\nAction: {name}\nAction Input: {to_json(arguments)}'
