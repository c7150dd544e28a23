"""Comparing with a schema ends, and says what jsonschema says."""

import random
import time

import jsonschema
import pytest

from internlm_mm.agents import bounded_schema
from internlm_mm.agents.bounded_schema import TooMuchWork, check, find_errors, is_pattern
from internlm_mm.agents.schemas import argument_errors, check_schema

WORDS = ('', 'a', 'ab', 'x1', '2026-11-26', 'é')
PATTERNS = (r'^a', r'\d', r'^[a-z]+$', r'^(?!x)', r'^\d{4}-\d\d-\d\d$', r'(a|b){2}')


def draw_instance(rng: random.Random, depth: int = 0) -> object:
    kinds = 'text number whole flag none list object'.split()
    kind = rng.choice(kinds[: 5 if depth > 2 else 7])
    if kind == 'list':
        return [draw_instance(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 'object':
        return {rng.choice(WORDS): draw_instance(rng, depth + 1) for _ in range(rng.randrange(4))}
    return {
        'text': rng.choice(WORDS),
        'number': rng.choice((0.5, 2.0, -1.5)),
        'whole': rng.randrange(-2, 4),
        'flag': rng.random() < 0.5,
        'none': None,
    }[kind]


def draw_schema(rng: random.Random, depth: int = 0) -> object:
    def one() -> object:
        return draw_schema(rng, depth + 1)

    if depth > 3 or rng.random() < 0.1:
        return rng.choice((True, False, {'type': 'string'}, {'type': 'number'}))
    draws = {
        'type': lambda: rng.choice(('object', 'array', 'string', ['integer', 'null'])),
        'pattern': lambda: rng.choice(PATTERNS),
        'properties': lambda: {rng.choice(WORDS): one() for _ in range(2)},
        'patternProperties': lambda: {rng.choice(PATTERNS): one() for _ in range(2)},
        'additionalProperties': one,
        'unevaluatedProperties': one,
        'propertyNames': one,
        'required': lambda: [rng.choice(WORDS)],
        'items': one,
        'uniqueItems': lambda: True,
        'contains': one,
        'enum': lambda: [draw_instance(rng, 3) for _ in range(2)],
        'anyOf': lambda: [one(), one()],
        'oneOf': lambda: [one(), one()],
        'not': one,
        'minimum': lambda: 1,
        '$ref': lambda: '#/$defs/word',
    }
    chosen = rng.sample(sorted(draws), rng.choice((1, 2, 2, 3)))
    if 'unevaluatedProperties' in chosen and 'patternProperties' in chosen:
        chosen.remove('patternProperties')
    return {key: draws[key]() for key in chosen}


def test_errors_are_those_of_jsonschema() -> None:
    rng = random.Random(0)
    refused = compared = 0
    for _ in range(400):
        schema = {'$defs': {'word': {'type': 'string', 'minLength': 2}}, 'x': draw_schema(rng)}
        schema['allOf'] = [schema.pop('x')]
        instance = draw_instance(rng)
        check(schema)
        try:
            found = find_errors(instance, schema)
        except TooMuchWork as error:
            assert 'unevaluatedProperties beside patternProperties' in str(error)
            refused += 1
            continue
        expected = list(jsonschema.Draft202012Validator(schema).iter_errors(instance))
        assert sorted(map(where, found)) == sorted(map(where, expected))
        compared += bool(expected)
    assert refused < 30 and compared > 130


def where(error: jsonschema.ValidationError) -> tuple[str, ...]:
    """What an error is, but for the words about patterns that no property matches."""
    said = '' if error.validator == 'additionalProperties' else error.message
    return tuple(map(str, (list(error.path), error.validator, said)))


@pytest.mark.parametrize('pattern', [r'^(a|a)*$', r'(?:(?:a{1,50}){1,50}){1,50}b'])
def test_a_regular_expression_that_takes_years_is_given_up(monkeypatch, pattern: str) -> None:
    monkeypatch.setattr(bounded_schema, 'MOST_SECONDS', 0.05)
    bounded_schema._SLOW.clear()
    text = 'a' * 64 + '!'
    cases = [
        ({'x': text}, {'properties': {'x': {'pattern': pattern}}}),
        ({text: 1}, {'patternProperties': {pattern: True}}),
        ({text: 1}, {'patternProperties': {pattern: True}, 'additionalProperties': False}),
    ]
    for forget in (True, False):
        for arguments, schema in cases:
            check_schema(schema, 'x')
            begin = time.perf_counter()
            (error,) = argument_errors(arguments, schema)
            assert error == f'the regular expression {pattern!r} of the schema takes too long'
            assert time.perf_counter() - begin < 10  # of years
            if forget:
                bounded_schema._SLOW.clear()
    bounded_schema._SLOW.clear()


def test_a_slow_pattern_is_tried_once(monkeypatch) -> None:
    monkeypatch.setattr(bounded_schema, 'MOST_SECONDS', 0.02)
    schema = {'properties': {'x': {'pattern': r'^(a|a)*$'}}}
    asked = []
    search = bounded_schema.regex.search
    monkeypatch.setattr(
        bounded_schema.regex, 'search', lambda *a, **k: asked.append(a) or search(*a, **k)
    )
    for _ in range(5):
        assert argument_errors({'x': 'a' * 64 + '!'}, schema)
    assert len(asked) == 1
    bounded_schema._SLOW.clear()


def test_a_schema_that_doubles_with_every_level_is_given_up() -> None:
    doubled = {f'd{n}': {'anyOf': [{'$ref': f'#/$defs/d{n + 1}'}] * 2} for n in range(60)}
    schema = {'$defs': {**doubled, 'd60': {'type': 'string'}}, '$ref': '#/$defs/d0'}
    assert argument_errors({}, schema) == ['comparing the arguments with the schema takes too long']


def test_large_arguments() -> None:
    unique = {'properties': {'x': {'uniqueItems': True}}}
    assert argument_errors({'x': list(range(20_000))}, unique) == []
    assert argument_errors({'x': [{'a': n} for n in range(400)]}, unique) == []
    many = [{'a': n} for n in range(20_000)]
    assert 'takes too long' in argument_errors({'x': many}, unique)[0]
    texts = {'properties': {'x': {'items': {'type': 'integer'}}}}
    errors = argument_errors({'x': ['a' * 100_000] * 1000}, texts)
    assert errors[-1] == 'and 97 or more' and all(len(error) < 400 for error in errors)


def test_numbers_out_of_range_are_an_error() -> None:
    for value in (10**400, float('inf')):
        (error,) = argument_errors({'x': value}, {'properties': {'x': {'multipleOf': 0.5}}})
        assert error.startswith('a number cannot be compared with the schema')


def test_a_schema_that_is_nested_too_deeply_is_none() -> None:
    schema: dict = {}
    for _ in range(900):
        schema = {'properties': {'a': schema}}
    with pytest.raises(ValueError, match=r'^here: nested too deeply$'):
        check_schema(schema, 'here')


@pytest.mark.parametrize(
    'pattern',
    [
        *('', r'\p{L}+', r'^\d{4}-\d{2}-\d{2}$', r'^(?!\s*$).+', '(?i)abc', r'(?<year>\d+)', '[(]'),
        *(r'[])(]+', r'(\()\1', '^{x}$', 'a{2000}', r'(?:(?=a)b)', r'(?<=a)b(?<!c)'),
        r'^[a-f0-9]{8}-[a-f0-9]{4}-[a-f0-9]{4}-[a-f0-9]{4}-[a-f0-9]{12}$',
    ],
)
def test_patterns_of_json_schema(pattern: str) -> None:
    assert is_pattern(pattern)
    check_schema({'pattern': pattern}, 'x')


@pytest.mark.parametrize(
    'pattern',
    [
        *('(', ')', '[', 'a**', '(?R)', '(?:(?R)a|b)', '(?1)', '(?(1)a)', '(?#c)', '(?x)a'),
        *('((a{1000}){1000}){1000}', 'a{999999999999}', '((' * 100, '(a{200}){200}', r'(\((?R)'),
    ],
)
def test_what_is_no_pattern_or_knows_no_bounds_is_refused(pattern: str) -> None:
    assert not is_pattern(pattern)
    with pytest.raises(ValueError, match="is not a 'regex'"):
        check_schema({'pattern': pattern}, 'x')
    (error,) = argument_errors({'x': 'a'}, {'properties': {'x': {'pattern': pattern}}})
    assert 'is no regular expression of JSON Schema' in error
