"""How questions are worded, by composition: a way to ask, and what is asked for."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cache

from agent_proof.draws import Side, side_of

OPENINGS = ('', '', '', 'Please: ', 'Hello. ', 'One question: ', 'Next: ', 'For my notes: ')
DESCRIPTION = 'Gives the {} of an item.'
WORK = 'Does some work.'
ENDS = ('', '', '', ' Thank you.', ' Thanks!', ' It is urgent.')

_ASKS = (
    'what is {}?',
    'let me have {}.',
    'compute {}.',
    'calculate {}.',
    'find {}.',
    'work out {}.',
    'tell me {}.',
    'give me {}.',
    'show {}.',
)
_CALLS = (
    'call {}.',
    'use {}.',
    'run {}.',
    'ask {}.',
    'start {}.',
    'try {}.',
    'apply {}.',
    'invoke {}.',
)
_SAYS = ('repeat {}.', 'say {}.', 'write {}.', 'type {}.', 'copy {}.', 'print {}.', 'answer {}.')
_GREETS = (
    'good morning, {}.',
    'good evening, {}.',
    'good day, {}.',
    'hey, {}.',
    'nice to meet you, {}.',
    'welcome, {}.',
)
_TAKES = ('take {}.', 'choose {}.', 'keep {}.', 'pick {}.', 'name {}.')

WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    'times': (
        _ASKS,
        ('{0} times {1}', '{0} multiplied by {1}', 'the product of {0} and {1}', '{0} * {1}'),
    ),
    'plus': (
        _ASKS,
        ('{0} plus {1}', '{0} and {1} together', 'the sum of {0} and {1}', '{0} + {1}'),
    ),
    'minus': (
        _ASKS,
        ('{0} minus {1}', '{0} less {1}', 'the difference of {0} and {1}', '{0} - {1}'),
    ),
    'remainder': (
        _ASKS,
        ('{0} modulo {1}', 'the rest of {0} by {1}', '{0} % {1}', 'the remainder of {0} by {1}'),
    ),
    'reverse': (
        _ASKS,
        ('{0} backwards', '{0} reversed', 'the mirror of {0}', 'the reverse of {0}'),
    ),
    'sort': (
        _ASKS,
        (
            '{0} sorted',
            'the sorted {0}',
            'the letters of {0} in order',
            '{0} in alphabetical order',
        ),
    ),
    'days': (
        _ASKS,
        (
            'the days from {0} to {1}',
            'the days between {0} and {1}',
            'the number of days from {0} until {1}',
            'the time in days between {0} and {1}',
        ),
    ),
    'later': (
        _ASKS,
        (
            'the date {1} days after {0}',
            'the day {1} days after {0}',
            'the date of {0} and {1} days',
            '{0} and {1} days later',
        ),
    ),
    'total': (
        _ASKS,
        (
            'the total of this table',
            'the sum of these rows',
            'the total over all rows',
            'the sum over this table',
            'the sum of all rows',
        ),
    ),
    'range': (
        _ASKS,
        (
            'the range of this table',
            'the range over all rows',
            'the largest less the smallest of these rows',
            'the largest minus the smallest of this table',
        ),
    ),
    'lookup': (
        _ASKS,
        ('the {0} of {1}', 'the {0} for {1}', 'the {0} that {1} has', 'the {0} listed for {1}'),
    ),
    'call': (
        _CALLS,
        ('{0} with {1}', 'the tool {0} with {1}', '{0} on {1}', 'the function {0} with {1}'),
    ),
    'lookup_times': (
        _ASKS,
        (
            'the {0} of {1} times {2}',
            'the {0} for {1} multiplied by {2}',
            '{2} times the {0} of {1}',
            'the product of {2} and the {0} of {1}',
        ),
    ),
    'times_minus': (
        _ASKS,
        (
            '{0} times {1}, then minus {2}',
            '{0} multiplied by {1}, less {2}',
            'the product of {0} and {1}, then less {2}',
            '{0} * {1}, then minus {2}',
        ),
    ),
    'repeat': (_SAYS, ('{0}', 'the word {0}', 'only {0}', 'this: {0}', '{0} once')),
    'greet': (_GREETS, ('I am {0}', 'this is {0}', 'my name is {0}', '{0} here')),
    'first': (
        _TAKES,
        ('the first of {0} and {1}', 'the first word of {0} {1}', 'the first one: {0} or {1}'),
    ),
}
"""Ways to ask and things to ask for, by task; any two of them make a wording."""


@cache
def wordings(task: str, side: Side) -> tuple[str, ...]:
    """The wordings of a task on one side; no way to ask for a thing is on both."""
    asks, things = WORDINGS[task]
    both = (ask.format(thing) for ask in asks for thing in things)
    found = tuple(core for core in both if side_of('wording', core) == side)
    assert found, f'no wording of {task} is on the side {side}'
    return found


def dress(core: str, rng: random.Random) -> str:
    """A wording with words before and behind it, and a capital letter where a sentence begins."""
    opening, end = rng.choice(OPENINGS), rng.choice(ENDS)
    if not opening.endswith(': ') and core[0].isalpha():
        core = core[0].upper() + core[1:]
    return opening + core + end


def tables(core: str) -> bool:
    """Whether a wording speaks of a table, which then follows."""
    return 'table' in core or 'rows' in core


@cache
def vocabulary() -> tuple[str, ...]:
    """Words of all wordings, as they stand in texts: behind a space, or at the beginning."""
    return tuple(sorted(set(_vocabulary())))


def _vocabulary() -> Iterator[str]:
    cores = [ask.format(thing) for asks, things in WORDINGS.values() for ask in asks
             for thing in things]  # fmt: skip
    for text in (*OPENINGS, *ENDS, *cores, DESCRIPTION, WORK):
        for found in re.findall(r'[A-Za-z]+', text):
            if len(found) > 1:  # "I" and "a" would cut names and words that begin with them
                yield from (f' {found}', f' {found.capitalize()}', found.capitalize())
