"""Every rule of the leaderboard's AST match, by cases made by hand."""

import pytest

from internlm_mm.evaluation.ast_match import Expected, match_calls, normalise
from internlm_mm.tokenizers.chat_messages import Call

SCHEMA = {
    'type': 'dict',
    'properties': {
        'city': {'type': 'string'},
        'days': {'type': 'integer'},
        'rate': {'type': 'float'},
        'share': {'type': 'number'},
        'deep': {'type': 'boolean'},
        'names': {'type': 'array', 'items': {'type': 'string'}},
        'sizes': {'type': 'array', 'items': {'type': 'float'}},
        'counts': {'type': 'array', 'items': {'type': 'integer'}},
        'place': {'type': 'tuple', 'items': {'type': 'float'}},
        'points': {'type': 'array', 'items': {'type': 'dict'}},
        'options': {'type': 'dict', 'properties': {'unit': {'type': 'string'}}},
        'thing': {'type': 'any'},
        'either': {'type': ['integer', 'null']},
        'free': {},
    },
    'required': [],
}


def judged(value, accepted: list, name: str, **schema) -> str | None:
    expected = [Expected('f', {name: accepted})]
    return match_calls([Call('f', {name: value})], expected, {'f': {**SCHEMA, **schema}})


@pytest.mark.parametrize(
    ('name', 'value', 'accepted', 'mismatch'),
    [
        # texts: case, blanks and some signs apart; quotes are one
        ('city', 'New York', ['new-york'], None),
        ('city', 'April 1, 2024', ['April 1,2024'], None),
        ('city', "it's", ['it"s'], None),
        ('city', 'New Yorks', ['New York'], 'value'),
        ('city', 'New York!', ['New York'], 'value'),
        ('city', 'NYC', ['New York', 'NYC'], None),
        ('city', 5, ['5'], 'type'),
        # a value of another type than declared is right where accepted values have that type
        ('city', 5, [5], None),
        ('city', 6, [5], 'value'),
        ('days', 'n', ['n'], None),
        ('days', 'N', ['n'], 'value'),
        # whole numbers are no floats, truth is no number; floats may be whole
        ('days', 3, [3, 4], None),
        ('days', 3.0, [3], 'type'),
        ('days', '3', [3], 'type'),
        ('days', True, [1], 'type'),
        ('rate', 3, [3.0], None),
        ('rate', 3, [3], None),
        ('rate', '3', [3.0], 'type'),
        ('share', 1, [1.0], None),
        ('share', 1.5, [1.25], 'value'),
        ('deep', True, [True], None),
        ('deep', False, [True], 'value'),
        ('deep', 1, [True], 'type'),
        ('deep', 'true', [True], 'type'),
        # lists: in order; texts in them as texts; items have the declared type or the accepted
        ('names', ['A b', 'c'], [['ab', 'C']], None),
        ('names', ['c', 'ab'], [['ab', 'c']], 'value'),
        ('names', ['ab'], [['x'], ['AB']], None),
        ('names', ['ab', 'c', 'd'], [['ab', 'c']], 'value'),
        ('names', 'ab', [['ab']], 'type'),
        ('names', [1], [['ab']], 'type'),
        ('names', [], ['', ['ab']], None),
        ('sizes', [1.0, 2.5], [[1.0, 2.5]], None),
        ('sizes', [1, 2.5], [[1.0, 2.5]], 'type'),
        ('sizes', [1, 2], [[1, 2]], None),
        ('counts', [1.0], [[1]], 'type'),
        ('place', [1.5, 2.5], [[1.5, 2.5]], None),
        ('place', [2.5, 1.5], [[1.5, 2.5]], 'value'),
        # objects: each key has a list of its own, and may be left out where '' is in it
        ('options', {'unit': 'KM'}, [{'unit': ['km', 'm']}], None),
        ('options', {'unit': 'mi'}, [{'unit': ['km', 'm']}], 'value'),
        ('options', {'unit': 'mi'}, [{'unit': ['km']}, {'unit': ['mi']}], None),
        ('options', {}, [{'unit': ['km', '']}], None),
        ('options', {}, [{'unit': ['km']}], 'value'),
        ('options', {'unit': 'km', 'more': 1}, [{'unit': ['km']}], 'value'),
        ('options', {'unit': 'km', 'at': {'x': 1}}, [{'unit': ['km'], 'at': [{'x': 1}]}], None),
        ('options', [], [{'unit': ['km', '']}], 'type'),
        # lists of objects: as many, in order
        ('points', [{'x': 1}, {'x': 2}], [[{'x': [1]}, {'x': [2, 3]}]], None),
        ('points', [{'x': 2}, {'x': 1}], [[{'x': [1]}, {'x': [2]}]], 'value'),
        ('points', [{'x': 1}], [[{'x': [1]}, {'x': [2]}]], 'value'),
        ('points', [{'x': 1}], [[{'x': [9]}], [{'x': [1]}]], None),
        ('points', [1], [[{'x': [1]}]], 'type'),
        # any: a text, or what the accepted values are
        ('thing', 'A', ['a'], None),
        ('thing', 4, [4], None),
        ('thing', [4], [4], 'type'),
        # of several types, or none, the value's own counts
        ('either', 3, [3], None),
        ('either', None, [None], None),
        ('either', 4, [3], 'value'),
        ('free', {'a': 'B'}, [{'a': ['b']}], None),
        ('free', 'B', ['b'], None),
        ('free', [1, 'B'], [[1, 'b']], None),
    ],
)
def test_values(name: str, value, accepted: list, mismatch: str | None) -> None:
    assert judged(value, accepted, name) == mismatch


def test_texts_of_accepted_values_are_read_as_texts() -> None:
    assert normalise("San  Jose, C.A. 3^2 a_b-c*d/e 'x'") == 'sanjoseca32abcde"x"'
    assert normalise(5) == 5


def one(arguments: dict, accepted: dict, schema: dict) -> str | None:
    return match_calls([Call('f', arguments)], [Expected('f', accepted)], {'f': schema})


def test_arguments_that_are_there_and_those_that_are_not() -> None:
    schema = {'properties': {'a': {'type': 'integer'}, 'b': {'type': 'integer'}}, 'required': ['a']}
    accepted = {'a': [1], 'b': [2, '']}
    assert one({'a': 1, 'b': 2}, accepted, schema) is None
    assert one({'a': 1}, accepted, schema) is None
    assert one({'b': 2}, accepted, schema) == 'missing'
    assert one({'a': 1}, {'a': [1], 'b': [2]}, schema) == 'missing'
    assert one({'a': 1, 'c': 2}, accepted, schema) == 'unexpected'
    assert one({'a': 1, 'b': 2}, {'a': [1]}, schema) == 'unexpected'  # declared, and not right
    assert one({}, {'a': ['', 1]}, schema) == 'missing'  # a required one is required
    assert one({'a': 1, 'c': 2}, {**accepted, 'c': [2]}, schema) == 'unexpected'


def test_one_call_of_the_right_function() -> None:
    schemas = {'f': SCHEMA, 'g': SCHEMA}
    right = [Expected('f', {'days': [1]})]
    assert match_calls([Call('g', {'days': 1})], right, schemas) == 'function'
    assert match_calls([], right, schemas) == 'count'
    assert match_calls([Call('f', {'days': 1})] * 2, right, schemas) == 'count'


def test_several_calls_match_one_to_one_in_any_order() -> None:
    schemas = {'f': SCHEMA, 'g': SCHEMA}
    f1, f2, g = Call('f', {'days': 1}), Call('f', {'days': 2}), Call('g', {'city': 'x'})
    right = [Expected('g', {'city': ['X']}), Expected('f', {'days': [1]}),
             Expected('f', {'days': [2]})]  # fmt: skip
    assert match_calls([f2, g, f1], right, schemas) is None
    assert match_calls([f1, g, f1], right, schemas) == 'value'
    assert match_calls([f1, g, Call('f', {'days': '2'})], right, schemas) == 'type'
    assert match_calls([f1, f2, f2], right, schemas) == 'function'
    # The first right one would take the call that the second needs, if it were asked first.
    greedy = [Expected('f', {'days': [1, 2]}), Expected('f', {'days': [1]})]
    assert match_calls([f1, f2], greedy, schemas) is None


def test_of_code_only_that_it_is_there() -> None:
    right = [Expected('python', {'code': ['print(6 * 7)']})]
    assert match_calls([Call('python', {'code': '6 * 7'})], right, {}) is None
    assert match_calls([Call('python', {})], right, {}) == 'missing'
    assert match_calls([Call('weather', {})], right, {}) == 'function'
