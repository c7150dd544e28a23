"""Comparing JSON with a JSON Schema, in bounded time whatever the two are.

A regular expression can take years, and so can a schema that refers to itself twice a level.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import lru_cache
from itertools import islice
from typing import Any

import jsonschema
import referencing
import regex

MOST_KEYWORDS = 50_000
"""Keywords of a schema that are looked at in one comparison: a second or two."""
MOST_SECONDS = 1.0
"""Of all regular expressions of one comparison."""
MOST_CHARACTERS = 20_000
"""Of a regular expression with its repeats written out."""
MOST_ERRORS = 100

Keyword = Callable[[Any, Any, Any, Any], Iterator[jsonschema.ValidationError] | None]


class TooMuchWork(Exception):
    """A comparison that would take too long; says why."""


class _Budget:
    """What is left of one comparison."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self.schema = schema
        self.keywords = MOST_KEYWORDS
        self.seconds = MOST_SECONDS

    def spend(self, keywords: int) -> None:
        self.keywords -= keywords
        if self.keywords < 0:
            raise TooMuchWork('comparing the arguments with the schema takes too long')

    def search(self, pattern: str, text: str) -> bool:
        """Whether a regular expression is found in a text."""
        slow = f'the regular expression {pattern!r} of the schema takes too long'
        if not is_pattern(pattern):
            raise TooMuchWork(f'{pattern!r} in the schema is no regular expression of JSON Schema')
        if pattern in _SLOW:  # once is enough for all records of a file
            raise TooMuchWork(slow)
        begin = time.perf_counter()
        try:
            found = regex.search(pattern, text, timeout=max(self.seconds, 1e-3))
        except TimeoutError:
            _SLOW.add(pattern)
            raise TooMuchWork(slow) from None
        self.seconds -= time.perf_counter() - begin
        return found is not None


_SLOW: set[str] = set()
_BUDGET: ContextVar[_Budget] = ContextVar('budget')


def find_errors(
    instance: Any, schema: Mapping[str, Any]
) -> list[jsonschema.exceptions.ValidationError]:
    """Where an instance does not fit a schema, at most `MOST_ERRORS` places, by path.

    Args:
        instance: What JSON gave.
        schema: Of Draft 2020-12. It may refer to its own parts; nothing is fetched.

    Raises:
        TooMuchWork: If comparing them takes too long.
        referencing.exceptions.Unresolvable: If the schema refers to what is not in it.
        RecursionError: If either is nested too deeply.
    """
    # Without a registry of its own, jsonschema would fetch what a schema refers to.
    validator = _Validator(schema, registry=referencing.Registry())
    token = _BUDGET.set(_Budget(schema))
    try:
        found = list(islice(validator.iter_errors(instance), MOST_ERRORS))
    finally:
        _BUDGET.reset(token)
    return sorted(found, key=lambda error: list(map(str, error.path)))


def check(schema: Any) -> None:
    """Refuse what is no JSON Schema.

    Raises:
        jsonschema.SchemaError: Of the first fault.
        RecursionError: If it is nested too deeply.
    """
    jsonschema.Draft202012Validator.check_schema(schema, format_checker=_FORMATS)


_FORMATS = jsonschema.FormatChecker(formats=())


_TOKEN = re.compile(
    r'(?P<open>\((?:\?(?::|<?[=!]|P?<\w+>))?)(?!\?)|(?P<close>\))|(?P<foreign>\(\?(?![ims]+\)))'
    r'|\{(?P<times>\d+)(?:,\d*)?\}'
    r'|(?P<one>\(\?[ims]+\)|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.)',
    re.DOTALL,
)


@_FORMATS.checks('regex')
@lru_cache(maxsize=4096)
def is_pattern(text: object) -> bool:
    r"""Whether a text is a regular expression as JSON Schema has them, and of a bounded size.

    More than Python's own: `\p{L}`. Less than the `regex` package has: recursion, conditions and
    comments in a pattern are refused, for they know no bounds.
    """
    if not isinstance(text, str):
        return True
    sizes, last = [0], 0  # of groups that are open, and of what stood last
    for token in _TOKEN.finditer(text):
        if token['foreign']:
            return False
        if token['open']:
            sizes.append(0)
            last = 0
        elif token['close']:
            if len(sizes) == 1:
                return False
            last = sizes.pop()
            sizes[-1] += last
        elif token['times']:  # regex writes out what is repeated
            sizes[-1] += last * (int(token['times'][:9]) - 1)
            last *= int(token['times'][:9])
        else:
            last = 1
            sizes[-1] += 1
        if max(sizes) > MOST_CHARACTERS:
            return False
    try:
        regex.compile(text)
    except (regex.error, RecursionError):
        return False
    return True


def _pattern(_: Any, pattern: str, instance: Any, __: Any) -> Iterator[jsonschema.ValidationError]:
    if isinstance(instance, str) and not _BUDGET.get().search(pattern, instance):
        yield jsonschema.ValidationError(f'{instance!r} does not match {pattern!r}')


def _pattern_properties(
    validator: Any, patterns: Mapping[str, Any], instance: Any, _: Any
) -> Iterator[jsonschema.ValidationError]:
    if not isinstance(instance, dict):
        return
    for pattern, schema in patterns.items():
        for key, value in instance.items():
            _BUDGET.get().spend(1)
            if _BUDGET.get().search(pattern, key):
                yield from validator.descend(value, schema, path=key, schema_path=pattern)


def _additional_properties(
    validator: Any, allowed: Any, instance: Any, schema: Mapping[str, Any]
) -> Iterator[jsonschema.ValidationError]:
    original = jsonschema.Draft202012Validator.VALIDATORS['additionalProperties']
    patterns = schema.get('patternProperties', {})
    if patterns and isinstance(instance, dict):
        known = schema.get('properties', {})
        search = _BUDGET.get().search
        instance = {
            key: value
            for key, value in instance.items()
            if key not in known and not any(search(pattern, key) for pattern in patterns)
        }
        schema = {}
    yield from original(validator, allowed, instance, schema) or ()


def _unique_items(
    validator: Any, asked: bool, instance: Any, schema: Any
) -> Iterator[jsonschema.ValidationError]:
    original = jsonschema.Draft202012Validator.VALIDATORS['uniqueItems']
    if isinstance(instance, list) and {type(item) for item in instance} - {str, int, float, bool}:
        _BUDGET.get().spend(len(instance) ** 2 // 4)  # each is compared with each
    yield from original(validator, asked, instance, schema) or ()


def _unevaluated_properties(
    validator: Any, allowed: Any, instance: Any, schema: Any
) -> Iterator[jsonschema.ValidationError]:
    # jsonschema looks for these patterns itself there, without a limit.
    if isinstance(instance, dict) and '"patternProperties"' in json.dumps(_BUDGET.get().schema):
        raise TooMuchWork('unevaluatedProperties beside patternProperties is not compared')
    original = jsonschema.Draft202012Validator.VALIDATORS['unevaluatedProperties']
    yield from original(validator, allowed, instance, schema) or ()


def _counted(keyword: Keyword) -> Keyword:
    """A keyword that the budget knows of."""

    def look(
        validator: Any, value: Any, instance: Any, schema: Any
    ) -> Iterator[jsonschema.ValidationError]:
        _BUDGET.get().spend(1)
        yield from keyword(validator, value, instance, schema) or ()

    return look


_Validator = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    {
        name: _counted(keyword)
        for name, keyword in {
            **jsonschema.Draft202012Validator.VALIDATORS,
            'pattern': _pattern,
            'patternProperties': _pattern_properties,
            'additionalProperties': _additional_properties,
            'uniqueItems': _unique_items,
            'unevaluatedProperties': _unevaluated_properties,
        }.items()
    },
)
