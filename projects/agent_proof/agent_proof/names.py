"""Names of functions, of their parameters and of what they give: invented ones."""

from __future__ import annotations

import random
from collections.abc import Iterable

from agent_proof.draws import Side, side_of
from agent_proof.wordings import vocabulary

_CONSONANTS = 'bdfgklmnprstvz'
_VOWELS = 'aeiou'


def name(rng: random.Random, side: Side, others: Iterable[str] = ()) -> str:
    """A name on one side, of two or three syllables, unlike `others`."""
    while True:
        syllables = [
            rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.choice((2, 2, 3)))
        ]
        found = ''.join(syllables)
        if side_of('name', found) == side and found not in others and is_one_piece(found):
            return found


def is_one_piece(found: str) -> bool:
    """Whether a name is cut behind a space as it is elsewhere: words are tokens there."""
    return not f' {found}'.startswith(vocabulary())
