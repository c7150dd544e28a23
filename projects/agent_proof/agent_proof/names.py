"""Names of functions, of their parameters and of what they give: invented ones."""

from __future__ import annotations

import random
from collections.abc import Iterable

from agent_proof.draws import Side, side_of
from agent_proof.wordings import vocabulary

SYLLABLES = tuple(first + second for first in 'bdfgklmnprstvz' for second in 'aeiou')
"""What names are made of."""


def name(rng: random.Random, side: Side, others: Iterable[str] = ()) -> str:
    """A name on one side, of two or three syllables, unlike `others`."""
    while True:
        found = ''.join(rng.choices(SYLLABLES, k=rng.choice((2, 2, 3))))
        if side_of('name', found) == side and found not in others and is_one_piece(found):
            return found


def is_one_piece(found: str) -> bool:
    """Whether a name is cut behind a space as it is elsewhere: words are tokens there."""
    return not f' {found}'.startswith(vocabulary())
