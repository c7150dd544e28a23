"""Steps in the manner of ReAct, as data sets spell them: Thought, Action, Action Input."""

from __future__ import annotations

import itertools
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
from internlm_mm.utils.suggest import kind

_THOUGHT, _ACTION, _INPUT = 'Thought:', 'Action:', 'Action Input:'


class Step(NamedTuple):
    """A thought, and the call that follows it."""

    thought: str
    name: str
    input: str


def read_step(text: str) -> Step | None:
    """The step that a text is; None if it is none."""
    lines = text.split('\n')
    filled = [number for number, line in enumerate(lines) if line.strip()]
    for number, following in itertools.pairwise(filled):
        action, given = lines[number].lstrip(), lines[following].lstrip()
        if not (action.startswith(_ACTION) and given.startswith(_INPUT)):
            continue
        thought = '\n'.join(lines[:number]).strip()
        name = action.removeprefix(_ACTION).strip()
        if not name or (thought and not thought.startswith(_THOUGHT)):
            return None
        thought = thought.removeprefix(_THOUGHT)
        thought = thought[1:] if thought.startswith((' ', '\t')) else thought
        rest = [given.removeprefix(_INPUT), *lines[following + 1 :]]
        return Step(thought, name, '\n'.join(rest).strip())
    return None


def step_message(step: Step, field: str) -> Message:
    """A step as an assistant's message.

    Raises:
        ValueError: If the input is no object.
    """
    arguments = literal(step.input, f'{field}, Action Input') if step.input else {}
    if not isinstance(arguments, dict):
        raise ValueError(f'{field}, Action Input: an object, not {kind(arguments)}')
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
