"""Rates and classes of errors, counted by hand."""

from internlm_mm.evaluation.verdicts import count_errors, known_rates, rate


def test_rates_of_those_that_there_are() -> None:
    records = [{'a': True}, {'a': False}, {'a': True}, {'a': True}]
    found = {'a': rate(records, lambda one: one['a']), 'b': rate([], lambda one: one['a'])}
    assert found == {'a': 0.75, 'b': None}
    assert known_rates(found) == {'a': 0.75}


def test_samples_are_counted_and_not_their_errors() -> None:
    records = [{'errors': ['json', 'json', 'schema']}, {'errors': ['json']}, {'errors': []}]
    assert list(count_errors(records).items()) == [('errors/json', 2), ('errors/schema', 1)]
