"""Schemas of functions, against jsonschema and pydantic."""

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Optional

import jsonschema
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from internlm_mm.agents.schemas import argument_errors, check_schema, schema_of


def search(
    query: str,
    limit: int = 3,
    *,
    order: Literal['new', 'old'] = 'new',
    tags: list[str] | None = None,
    scores: dict[str, float] | None = None,
) -> str:
    """Look something up.

    Over all pages.

    Args:
        query: What to look for,
            in words.
        limit (int): Most results.
        order: Which first.

    Returns:
        Titles.
    """
    return f'{query} {limit} {order} {tags} {scores}'


def test_of_a_function():
    schema = schema_of(search)
    assert (
        schema['name'] == 'search' and schema['description'] == 'Look something up. Over all pages.'
    )
    parameters = schema['parameters']
    jsonschema.Draft202012Validator.check_schema(parameters)
    assert parameters['required'] == ['query'] and not parameters['additionalProperties']
    properties = parameters['properties']
    assert properties['query'] == {'type': 'string', 'description': 'What to look for, in words.'}
    assert properties['limit'] == {'type': 'integer', 'description': 'Most results.', 'default': 3}
    assert properties['order']['enum'] == ['new', 'old']
    assert properties['tags']['anyOf'] == [
        {'type': 'array', 'items': {'type': 'string'}},
        {'type': 'null'},
    ]
    assert argument_errors({'query': 'x', 'scores': {'a': 1}}, parameters) == []


HINTS = [str, int, float, bool, list, dict, list[int], list[list[str]], dict[str, bool],
         Sequence[float], Mapping[str, int], str | None, Optional[int], int | str,  # noqa: UP045
         list[int] | None, Literal['a', 'b'], Any, tuple[int, ...]]  # fmt: skip
VALUES = some.recursive(
    some.one_of(some.none(), some.booleans(), some.integers(-2, 2), some.sampled_from('ab')),
    lambda inner: some.one_of(
        some.lists(inner, max_size=2), some.dictionaries(some.sampled_from('ab'), inner, max_size=2)
    ),
    max_leaves=4,
)  # fmt: skip


@pytest.mark.parametrize('hint', HINTS, ids=str)
@settings(max_examples=25, deadline=None)
@given(value=VALUES)
def test_a_value_fits_where_pydantic_takes_it(hint, value):
    def function(x):
        pass

    function.__annotations__['x'] = hint
    fits = not argument_errors({'x': value}, schema_of(function)['parameters'])
    adapter = pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(strict=True))
    try:
        adapter.validate_json(json.dumps(value))
        taken = True
    except pydantic.ValidationError:
        taken = False
    assert fits == taken


def no_type(x):
    pass


def many(*x: int):
    pass


def odd(x: inspect.Parameter):
    pass


def keys(x: dict[int, str]):
    pass


def pair(x: tuple[int, str]):
    pass


@pytest.mark.parametrize(
    ('function', 'error'),
    [
        (no_type, "tool 'no_type': parameter 'x' has no type"),
        (many, "tool 'many': parameter 'x' has no name to call it by"),
        (odd, "tool 'odd': parameter 'x': there is no JSON for"),
        (keys, 'keys are texts in JSON'),
        (pair, 'has items of several types'),
    ],
)
def test_functions_that_cannot_be_tools(function, error):
    with pytest.raises(ValueError, match=error):
        schema_of(function)


def test_errors_are_told_with_their_place():
    schema = schema_of(search)['parameters']
    wrong = {'limit': 'three', 'tags': ['a', 2], 'x': 1, 'order': 'best'}
    errors = argument_errors(wrong, schema)
    assert errors[-1] == 'and 2 more' and len(errors) == 4
    assert argument_errors({'query': 3}, schema) == ["['query']: 3 is not of type 'string'"]


def test_nothing_is_fetched(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('a schema was fetched')

    monkeypatch.setattr('urllib.request.urlopen', refuse)
    schema = {'type': 'object', 'properties': {'x': {'$ref': 'http://127.0.0.1:1/schema.json'}}}
    assert argument_errors({'x': 1}, schema) == [
        "the schema refers to 'http://127.0.0.1:1/schema.json', which is not in it"
    ]
    inside = {'$defs': {'n': {'type': 'integer'}}, 'properties': {'x': {'$ref': '#/$defs/n'}}}
    assert argument_errors({'x': 1}, inside) == []


def test_schemas_that_are_none():
    with pytest.raises(ValueError, match=r"^here: no JSON Schema: 'objekt' is not valid"):
        check_schema({'type': 'objekt'}, 'here')
