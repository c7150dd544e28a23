"""Calls as a model gets them wrong: training shows what it is told, and how they are mended."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from agent_proof.draws import side_of
from agent_proof.names import SYLLABLES, is_one_piece
from agent_proof.plugins import Plugin

Wrong = tuple[str, dict[str, Any]]
"""A function's name and arguments."""


def draw_mistake(
    rng: random.Random, name: str, arguments: dict[str, Any], plugins: Sequence[Plugin]
) -> Wrong:
    """A call that does not fit, made of a right one.

    It has the name of no function, of another one, a parameter of another name, or a value of
    another type.

    Args:
        rng: To draw from.
        name: Of the function that is right.
        arguments: That are right.
        plugins: All that are declared.
    """
    others = [plugin for plugin in plugins if plugin.name != name]
    kind = rng.choice(('name', 'key', 'type', *(('other', 'other key') if others else ())))
    if kind == 'name':
        return _unknown_name(rng, plugins), arguments
    if kind == 'other':
        return rng.choice(others).name, arguments
    key, value = rng.choice(list(arguments.items()))
    if kind == 'type':
        return name, {**arguments, key: _other_type(value)}
    new = name if kind == 'key' else rng.choice(list(rng.choice(others).types))
    return name, {new if one == key else one: said for one, said in arguments.items()}


def _unknown_name(rng: random.Random, plugins: Sequence[Plugin]) -> str:
    """Pieces of names that are declared, which together are the name of nothing."""
    names = [one for plugin in plugins for one in (plugin.name, *plugin.types)]
    pieces = [one[start : start + 2] for one in names for start in range(0, len(one), 2)]
    while True:
        found = ''.join(rng.choices([*pieces, rng.choice(SYLLABLES)], k=rng.choice((1, 2, 2, 3))))
        if found not in names and side_of('name', found) == 'train' and is_one_piece(found):
            return found


def _other_type(value: str | int | bool) -> str | int | bool:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    return int(value) if value.isdigit() else len(value)
