import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from internlm_mm.datasets.bins import Bins, best_fit, in_sequence, one_each

LENGTHS = some.lists(some.integers(1, 20), max_size=40).map(lambda x: np.array(x, np.int64))


def rows_of(bins: Bins) -> list[list[int]]:
    return [bins.row(index).tolist() for index in range(len(bins))]


@given(LENGTHS, some.integers(20, 30), some.sampled_from([best_fit, in_sequence, one_each]))
def test_every_document_is_in_one_row_that_holds_it(lengths, capacity, make) -> None:
    bins = make(lengths, capacity)
    rows = rows_of(bins)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(1 <= len(row) and lengths[row].sum() <= capacity for row in rows)
    assert bins.most == max(map(len, rows), default=0)


@given(LENGTHS, some.integers(20, 30))
def test_best_fit_needs_no_more_rows_than_the_order_as_it_is(lengths, capacity) -> None:
    assert len(best_fit(lengths, capacity)) <= len(in_sequence(lengths, capacity))


def fewest(lengths: list[int], capacity: int) -> int:
    """By trying every way."""

    def fill(rest: list[int], rows: list[int]) -> int:
        if not rest:
            return len(rows)
        found = [
            fill(rest[1:], [*rows[:i], rows[i] + rest[0], *rows[i + 1 :]])
            for i in range(len(rows))
            if rows[i] + rest[0] <= capacity
        ]
        return min([*found, fill(rest[1:], [*rows, rest[0]])])

    return fill(lengths, [])


@given(some.lists(some.integers(1, 12), max_size=6))
@settings(max_examples=60, deadline=None)
def test_best_fit_is_near_the_fewest_rows(lengths) -> None:
    rows = len(best_fit(np.array(lengths, np.int64), 12))
    assert fewest(lengths, 12) <= rows <= 11 / 9 * fewest(lengths, 12) + 6 / 9


def test_in_sequence_keeps_the_order() -> None:
    assert rows_of(in_sequence(np.array([3, 4, 4, 8, 1]), 8)) == [[0, 1], [2], [3], [4]]


def test_a_document_that_is_too_long() -> None:
    with pytest.raises(ValueError, match='document 1 has 9 tokens, more than the 8 of a row'):
        best_fit(np.array([8, 9]), 8)
