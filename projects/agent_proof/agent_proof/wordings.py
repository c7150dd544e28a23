"""How questions are worded, by composition: a way to ask, and what is asked for."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from agent_proof.draws import Side

DESCRIPTION = 'Gives the {} of an item.'
WORK = 'Does some work.'


class Phrases(NamedTuple):
    """Phrases of one kind. None of them is on both sides, and none is made of unknown words.

    Attributes:
        train: Those of training conversations.
        held_out: Those of held-out questions.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]

    def of(self, side: Side) -> tuple[str, ...]:
        """Those of one side."""
        return self.train if side == 'train' else self.held_out


OPENINGS = Phrases(
    (
        *('', '', '', 'Please: ', 'Hello. ', 'One question: ', 'Next: ', 'For my notes: '),
        *('Hello, next question: ', 'Please, for my notes: '),
    ),
    ('', '', 'Hello. Please: ', 'Next question: ', 'Hello, for my notes: '),
)
ENDS = Phrases(
    ('', '', '', ' Thank you.', ' Thanks!', ' It is urgent.', ' Thanks, it is urgent.'),
    ('', '', ' Thank you, it is urgent.', ' It is urgent. Thanks!', ' It is urgent. Thank you.'),
)
"""Words before and behind a wording, if any."""

_ASKS = Phrases(
    (
        *('what is {}?', 'let me have {}.', 'compute {}.', 'calculate {}.', 'find {}.'),
        *('work out {}.', 'tell me {}.', 'give me {}.', 'show {}.', 'I want to know {}.'),
        *('can you tell me {}?', 'please show me {}.', 'please compute {}.'),
    ),
    (
        *('let me know {}.', 'show me {}.', 'can you work out {}?', 'I want to have {}.'),
        *('please find {}.', 'can you please give me {}?'),
    ),
)
_CALLS = Phrases(
    (
        *('call {}.', 'use {}.', 'run {}.', 'ask {}.', 'start {}.', 'try {}.', 'apply {}.'),
        *('invoke {}.', 'please use {}.', 'I want you to run {}.', 'now call {}.'),
    ),
    ('please call {}.', 'I want you to use {}.', 'now please try {}.', 'now run {}.'),
)
_SAYS = Phrases(
    (
        *('repeat {}.', 'say {}.', 'write {}.', 'type {}.', 'copy {}.', 'print {}.'),
        *('answer {}.', 'please write {}.', 'I want you to repeat {}.', 'now say {}.'),
    ),
    ('please say {}.', 'I want you to type {}.', 'now please copy {}.', 'now write {}.'),
)
_GREETS = Phrases(
    (
        *('good morning, {}.', 'good evening, {}.', 'good day, {}.', 'hey, {}.', 'hi, {}.'),
        *('nice to meet you, {}.', 'welcome, {}.', 'hey and welcome, {}.'),
    ),
    ('hey and good evening, {}.', 'hi and good day, {}.', 'welcome and good morning, {}.'),
)
_TAKES = Phrases(
    (
        *('take {}.', 'choose {}.', 'keep {}.', 'pick {}.', 'name {}.', 'please keep {}.'),
        *('I want you to pick {}.', 'now take {}.'),
    ),
    ('please take {}.', 'I want you to name {}.', 'now please choose {}.'),
)

WORDINGS: dict[str, tuple[Phrases, Phrases]] = {
    'times': (
        _ASKS,
        Phrases(
            (
                *('{0} times {1}', '{0} multiplied by {1}', 'the product of {0} and {1}'),
                *('{0} * {1}', 'the product {0} * {1}', '{0} and {1} multiplied'),
            ),
            ('the product {0} times {1}', 'the product of {0} by {1}', '{0} by {1} multiplied'),
        ),
    ),
    'plus': (
        _ASKS,
        Phrases(
            (
                *('{0} plus {1}', '{0} and {1} together', 'the sum of {0} and {1}'),
                *('{0} + {1}', 'the sum {0} + {1}', '{0} added to {1}'),
            ),
            ('the sum {0} plus {1}', '{0} and {1} added', 'the sum of {0} and {1} together'),
        ),
    ),
    'minus': (
        _ASKS,
        Phrases(
            (
                *('{0} minus {1}', '{0} less {1}', 'the difference of {0} and {1}'),
                *('{0} - {1}', 'the difference {0} - {1}', '{0} with {1} taken off'),
            ),
            ('the difference {0} minus {1}', 'the difference of {0} less {1}', '{0}, less {1}'),
        ),
    ),
    'remainder': (
        _ASKS,
        Phrases(
            (
                *('{0} modulo {1}', 'the rest of {0} by {1}', 'the remainder of {0} by {1}'),
                *('{0} % {1}', 'the remainder {0} % {1}', 'the rest of {0} divided by {1}'),
            ),
            (
                *('the remainder {0} modulo {1}', 'the remainder of {0} divided by {1}'),
                'the rest of {0} modulo {1}',
            ),
        ),
    ),
    'reverse': (
        _ASKS,
        Phrases(
            (
                *('{0} backwards', '{0} reversed', 'the mirror of {0}', 'the reverse of {0}'),
                *('the letters of {0} backwards', 'the word {0} reversed'),
            ),
            (
                *('the letters of {0} reversed', 'the word {0} backwards'),
                'the mirror of the word {0}',
            ),
        ),
    ),
    'sort': (
        _ASKS,
        Phrases(
            (
                *('{0} sorted', 'the sorted {0}', 'the letters of {0} in order'),
                *('{0} in alphabetical order', 'the letters of {0} sorted'),
                'the word {0} in alphabetical order',
            ),
            (
                *('the sorted letters of {0}', 'the word {0} sorted'),
                'the letters of {0} in alphabetical order',
            ),
        ),
    ),
    'days': (
        _ASKS,
        Phrases(
            (
                *('the days from {0} to {1}', 'the days between {0} and {1}'),
                *('the number of days from {0} until {1}', 'the time from {0} until {1}'),
                *('the time in days between {0} and {1}', 'the number of days between {0} and {1}'),
            ),
            (
                *('the number of days from {0} to {1}', 'the time between {0} and {1}'),
                'the time in days from {0} until {1}',
            ),
        ),
    ),
    'later': (
        _ASKS,
        Phrases(
            (
                *('the date {1} days after {0}', 'the day {1} days after {0}'),
                *('the date of {0} and {1} days', '{0} and {1} days later'),
                *('the date of {0} plus {1} days', 'the day that is {1} days after {0}'),
            ),
            (
                *('the date that is {1} days after {0}', 'the day {1} days later, after {0}'),
                '{0} plus {1} days',
            ),
        ),
    ),
    'total': (
        _ASKS,
        Phrases(
            (
                *('the total of this table', 'the sum of these rows', 'the total over all rows'),
                *('the sum over this table', 'the sum of all rows', 'the total of these rows'),
            ),
            ('the sum of this table', 'the total of all rows', 'the sum over these rows'),
        ),
    ),
    'range': (
        _ASKS,
        Phrases(
            (
                *('the range of this table', 'the range over all rows', 'the range of all rows'),
                'the largest less the smallest of these rows',
                'the largest less the smallest of this table',
                'the largest minus the smallest of this table',
            ),
            (
                *('the range of these rows', 'the range over this table'),
                'the largest minus the smallest of these rows',
            ),
        ),
    ),
    'lookup': (
        _ASKS,
        Phrases(
            (
                *('the {0} of {1}', 'the {0} for {1}', 'the {0} that {1} has'),
                *('the {0} listed for {1}', 'the {0} that is of {1}', 'the {0} given for {1}'),
            ),
            ('the {0} {1} has', 'the {0} that is listed for {1}', 'the {0} that is for {1}'),
        ),
    ),
    'call': (
        _CALLS,
        Phrases(
            (
                *('{0} with {1}', 'the tool {0} with {1}', 'the function {0} with {1}'),
                *('{0} on {1}', 'the tool {0} for {1}', '{0} given {1}'),
            ),
            ('the function {0} on {1}', 'the tool {0} given {1}', '{0} for {1}'),
        ),
    ),
    'lookup_times': (
        _ASKS,
        Phrases(
            (
                *('the {0} of {1} times {2}', 'the {0} for {1} multiplied by {2}'),
                *('{2} times the {0} of {1}', 'the product of {2} and the {0} of {1}'),
                *('the {0} of {1} * {2}', '{2} multiplied by the {0} for {1}'),
            ),
            (
                *('the {0} of {1} multiplied by {2}', '{2} times the {0} for {1}'),
                'the product of {2} and the {0} for {1}',
            ),
        ),
    ),
    'times_minus': (
        _ASKS,
        Phrases(
            (
                *('{0} times {1}, then minus {2}', '{0} multiplied by {1}, less {2}'),
                'the product of {0} and {1}, then less {2}',
                *('{0} * {1}, then minus {2}', '{0} times {1}, less {2}'),
                'the product of {0} and {1}, minus {2}',
            ),
            (
                *('{0} multiplied by {1}, then minus {2}', '{0} * {1}, then less {2}'),
                'the product of {0} and {1}, less {2}',
            ),
        ),
    ),
    'repeat': (
        _SAYS,
        Phrases(
            ('{0}', 'the word {0}', 'only {0}', 'this: {0}', '{0} once', 'only the word {0}'),
            ('this word: {0}', 'the word {0} once', 'only this: {0}'),
        ),
    ),
    'greet': (
        _GREETS,
        Phrases(
            ('I am {0}', 'this is {0}', 'my name is {0}', '{0} here', 'here is {0}'),
            ('this is {0} here', 'my name here is {0}', 'here I am, {0}'),
        ),
    ),
    'first': (
        _TAKES,
        Phrases(
            (
                *('the first of {0} and {1}', 'the first word of {0} {1}'),
                *('the first one: {0} or {1}', 'the first one of {0} {1}'),
            ),
            (
                *('the first one of {0} and {1}', 'the first word: {0} or {1}'),
                'the first of {0} or {1}',
            ),
        ),
    ),
}
"""Ways to ask and things to ask for, by task; any two of one side make a wording."""


@cache
def wordings(task: str, side: Side) -> tuple[str, ...]:
    """The wordings of a task on one side; neither half of them is on the other side."""
    asks, things = WORDINGS[task]
    return tuple(ask.format(thing) for ask in asks.of(side) for thing in things.of(side))


def dress(core: str, rng: random.Random, side: Side) -> str:
    """A wording with words before and behind it, and a capital letter where a sentence begins."""
    opening, end = rng.choice(OPENINGS.of(side)), rng.choice(ENDS.of(side))
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
    phrases = [phrase for of in WORDINGS.values() for kind in of for phrase in kind.train]
    for text in (*OPENINGS.train, *ENDS.train, *phrases, DESCRIPTION, WORK):
        for found in re.findall(r'[A-Za-z]+', text):
            if len(found) > 1:  # "I" and "a" would cut names and words that begin with them
                yield from (f' {found}', f' {found.capitalize()}', found.capitalize())
