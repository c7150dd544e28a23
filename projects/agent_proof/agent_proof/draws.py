"""Which side of the split things are on, and what is drawn at random: numbers, words, days."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from datetime import date, timedelta
from typing import Literal

Side = Literal['train', 'held_out']
HELD_OUT_OF = 5
"""One of so many operands, answers and names is held out."""
LETTERS = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ'


def side_of(what: str, text: str) -> Side:
    """The side that something is on, by its hash; the same for every seed.

    Args:
        what: Its kind: 'operands', 'answer', 'name'.
        text: How it is written.
    """
    digest = hashlib.sha256(f'{what} {text}'.encode()).digest()
    return 'held_out' if int.from_bytes(digest[:8], 'big') % HELD_OUT_OF == 0 else 'train'


def operand_key(operands: Iterable[str]) -> str:
    """One key for the same operands in any order, whatever is done with them."""
    return ' '.join(sorted(operands))


def number(rng: random.Random, digits: Iterable[int] = (4, 5)) -> str:
    """A number of so many digits."""
    count = rng.choice(list(digits))
    return str(rng.randrange(10 ** (count - 1), 10**count))


def word(rng: random.Random, lengths: Iterable[int] = (4, 5, 6)) -> str:
    """Capital letters; they spell nothing."""
    return ''.join(rng.choices(LETTERS, k=rng.choice(list(lengths))))


def day(rng: random.Random) -> date:
    """A day of the 20th or 21st century."""
    return date(1900, 1, 1) + timedelta(days=rng.randrange(73_000))
