"""Functions with invented names, whose results anybody can compute."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from agent_proof.draws import Side, number, word
from agent_proof.names import name
from agent_proof.wordings import DESCRIPTION, WORK
from internlm_mm.agents import Tool

TYPES = ('string', 'integer', 'boolean')


@dataclass(frozen=True)
class Plugin:
    """A function that a model may call.

    Attributes:
        name: Of the function.
        description: What it does.
        types: JSON type of each parameter, by name, in their order.
        optional: Parameters that need not be given.
    """

    name: str
    description: str
    types: Mapping[str, str]
    optional: tuple[str, ...] = ()

    @property
    def parameters(self) -> dict[str, Any]:
        """JSON Schema of the arguments."""
        return {
            'type': 'object',
            'properties': {key: {'type': kind} for key, kind in self.types.items()},
            'required': [key for key in self.types if key not in self.optional],
        }

    def declaration(self) -> dict[str, Any]:
        """The function in OpenAI's form."""
        function = {
            'name': self.name,
            'description': self.description,
            'parameters': self.parameters,
        }
        return {'type': 'function', 'function': function}

    def tool(self) -> Tool:
        """As the agents' toolbox takes it; its schema is checked, which takes its time."""
        function = partial(result_of, self.name)
        return Tool(self.name, self.description, self.parameters, function)


def result_of(function: str, /, **arguments: Any) -> int:
    """What a function gives: a number of four or five digits that follows from all it is given."""
    text = json.dumps([function, arguments], sort_keys=True)
    return 1000 + int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], 'big') % 99_000


def lookup_plugin(rng: random.Random, side: Side, thing: str, others: set[str]) -> Plugin:
    """A function that gives something of an item, which its description names."""
    function = name(rng, side, others)
    parameter = name(rng, side, {*others, function})
    return Plugin(function, DESCRIPTION.format(thing), {parameter: 'string'})


def typed_plugin(rng: random.Random, side: Side) -> Plugin:
    """A function with one to three parameters, of which one may be optional."""
    names: list[str] = []
    for _ in range(1 + rng.choice((1, 2, 2, 3))):
        names.append(name(rng, side, names))
    function, *parameters = names
    types = {parameter: rng.choice(TYPES[: rng.choice((2, 3))]) for parameter in parameters}
    optional = (parameters[-1],) if len(parameters) > 1 and rng.random() < 0.25 else ()
    return Plugin(function, WORK, types, optional)


def draw_value(rng: random.Random, kind: str) -> str | int | bool:
    """An argument of a type; a string may be made of digits."""
    if kind == 'boolean':
        return rng.random() < 0.5
    if kind == 'integer':
        return int(number(rng))
    return number(rng) if rng.random() < 0.3 else word(rng)


def spell_value(value: str | int | bool) -> str:
    """An argument as a question spells it."""
    return value if isinstance(value, str) else json.dumps(value)
