"""Sampling as it is typed."""

import dataclasses

import pytest

from internlm_mm.inference import Sampling
from internlm_mm.inference.settings import change_sampling, show_sampling


@pytest.mark.parametrize(
    ('key', 'value', 'read'),
    [
        ('max_new_tokens', '7', 7),
        ('temperature', '0.5', 0.5),
        ('top_k', '3', 3),
        ('top_k', 'none', None),
        ('seed', 'None', None),
        ('stop', 'a b', ('a b',)),
        ('stop', '["a", "b"]', ('a', 'b')),
        ('stop', 'none', ()),
        ('stop_ids', '5', (5,)),
        ('stop_ids', '[5, 6]', (5, 6)),
    ],
)
def test_values(key, value, read):
    before = Sampling(top_k=1, seed=2, stop=('x',), stop_ids=(9,))
    changed = change_sampling(before, key, value)
    assert getattr(changed, key) == read
    assert dataclasses.replace(changed, **{key: getattr(before, key)}) == before


@pytest.mark.parametrize(
    ('key', 'value', 'error'),
    [
        ('top', '1', "no setting 'top'. Did you mean 'stop'"),
        ('top_k', '1.5', "top_k takes a whole number or 'none', not '1.5'"),
        ('temperature', '', "temperature takes a number, not ''"),
        ('stop', '["a"', "stop takes a text, a JSON list or 'none'"),
        ('stop_ids', 'a', "stop_ids takes a whole number, a JSON list or 'none', not 'a'"),
        ('stop_ids', '[1.5]', 'stop_ids takes a whole number, a JSON list'),
        ('stop_ids', '[null]', 'stop_ids takes a whole number, a JSON list'),
        ('stop', '["a", 1]', 'stop takes a text, a JSON list'),
        ('temperature', 'nan', 'temperature=nan must be 0, or'),
        ('top_p', '0', 'top_p=0.0 is not in'),
    ],
)
def test_what_is_no_value(key, value, error):
    with pytest.raises(ValueError, match=error):
        change_sampling(Sampling(), key, value)


def test_what_is_shown_reads_back():
    before = Sampling(temperature=0.7, top_k=5, stop=('\n', 'é'), stop_ids=(1, 2), seed=3)
    after = Sampling()
    for line in show_sampling(before).splitlines():
        after = change_sampling(after, *line.split(' ', 1))
    assert after == before
