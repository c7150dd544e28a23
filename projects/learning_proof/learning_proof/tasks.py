"""Questions whose answers a line of Python knows, split into training and held-out by operands."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

LETTERS = 'ABCDEFGHIJKL'
LENGTHS = range(3, 7)
"""Letters of an operand of `copy`, `reverse` and `sort`."""
NUMBERS = range(10, 100)
"""Operands of `add`: two digits each."""
TASKS = ('copy', 'reverse', 'sort', 'add')
HELD_OUT_OF = 10
"""One operand in so many is held out."""
BRACKETS = ('[', ']')


@dataclass(frozen=True)
class Case:
    """One question.

    Attributes:
        task: One of `TASKS`.
        operands: A word of letters, or two numbers.
    """

    task: str
    operands: tuple[str, ...]

    @property
    def question(self) -> str:
        """What the user asks."""
        return ' '.join((self.task, *self.operands))

    @property
    def answer(self) -> str:
        """The right answer in its plain form."""
        if self.task == 'add':
            return str(sum(map(int, self.operands)))
        (word,) = self.operands
        return {'copy': word, 'reverse': word[::-1], 'sort': ''.join(sorted(word))}[self.task]

    @property
    def bracketed(self) -> str:
        """The right answer in the form that the planted preference asks for."""
        return self.answer.join(BRACKETS)

    @property
    def key(self) -> str:
        """What decides on which side the case is."""
        return operand_key(*self.operands)


def operand_key(*operands: str) -> str:
    """One key for all operands that could give an answer away.

    For two numbers the pair in either order; for a word its letters in any order, so that neither
    the word, nor its mirror image, nor an anagram with the same sorted answer is on both sides.
    """
    if len(operands) == 1:
        return ''.join(sorted(operands[0]))
    return ' '.join(map(str, sorted(map(int, operands))))


def is_held_out(key: str) -> bool:
    """Whether operands with this key are never trained on, by any run of any seed."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], 'big') % HELD_OUT_OF == 0


def draw_operands(task: str, held_out: bool, rng: random.Random) -> tuple[str, ...]:
    """Operands of a task on one side of the split."""
    while True:
        operands: tuple[str, ...]
        if task == 'add':
            operands = (str(rng.choice(NUMBERS)), str(rng.choice(NUMBERS)))
        else:
            operands = (''.join(rng.choices(LETTERS, k=rng.choice(LENGTHS))),)
        if is_held_out(operand_key(*operands)) == held_out:
            return operands


def draw_cases(task: str, count: int, *, held_out: bool, seed: int) -> list[Case]:
    """Different cases of one task.

    Args:
        task: One of `TASKS`.
        count: How many.
        held_out: On which side of the split.
        seed: Another seed, other cases.

    Raises:
        ValueError: If the task has too few cases on this side.
    """
    rng = random.Random(f'{task} {held_out} {seed}')
    found: dict[Case, None] = {}
    for _ in range(10 * count):
        if len(found) == count:
            break
        found[Case(task, draw_operands(task, held_out, rng))] = None
    if len(found) < count:
        side = 'held out' if held_out else 'to train on'
        raise ValueError(f'{task}: fewer than {count} cases {side}, only {len(found)} were found')
    return list(found)


def plain_texts(count: int, seed: int) -> dict[str, Iterator[str]]:
    """Texts for the base model, by domain.

    Repeated words, letters in the order of the alphabet, counting, and sums: what somebody knows
    before being asked anything. All operands are from the side of training.

    Args:
        count: Texts of each domain.
        seed: Another seed, other texts.
    """
    return {name: _texts(name, count, seed) for name in _KINDS}


def random_talk(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Turns of a user and an assistant that have nothing to do with one another.

    The words of the questions are in them, operands of the side of training, and answers in both
    forms: what a conversation looks like, and nothing of what it means.

    Args:
        count: Pairs of turns.
        seed: Another seed, other turns.
    """
    rng = random.Random(f'talk {seed}')
    for _ in range(count):
        said = Case(rng.choice(TASKS), draw_operands(rng.choice(TASKS), False, rng))
        task = rng.choice(TASKS)
        reply = Case(task, draw_operands(task, False, rng))
        yield said.question, rng.choice((reply.answer, reply.bracketed))


def _texts(name: str, count: int, seed: int) -> Iterator[str]:
    rng = random.Random(f'{name} {seed}')
    for _ in range(count):
        yield _KINDS[name](rng)


def _repeats(rng: random.Random) -> str:
    (word,) = draw_operands('copy', False, rng)
    return ' '.join([word] * rng.randint(2, 4))


def _orders(rng: random.Random) -> str:
    (word,) = draw_operands('sort', False, rng)
    return ''.join(sorted(word))


def _counting(rng: random.Random) -> str:
    first, step = rng.randint(0, 150), rng.choice((1, 2, 5, 10))
    return ' '.join(str(number) for number in range(first, first + 6 * step, step))


def _sums(rng: random.Random) -> str:
    first, second = map(int, draw_operands('add', False, rng))
    if rng.random() < 0.5:  # small ones, too: they are no operands of any question
        first, second = rng.choice((first, first % 10)), second % 10
    return f'{first}+{second}={first + second}'


_KINDS = dict(repeats=_repeats, orders=_orders, counting=_counting, sums=_sums)
