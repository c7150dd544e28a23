from collections import Counter

import pytest

from internlm_mm.datasets.row_order import RowOrder, check_order


def test_an_epoch_is_every_row_once_in_an_order_of_its_own() -> None:
    order = RowOrder(['a', 'b'], [5, 8], seed=3)
    rows = [(domain, row) for domain, size in enumerate([5, 8]) for row in range(size)]
    epochs = [[order.locate(epoch * 13 + i) for i in range(13)] for epoch in range(3)]
    assert len(order) == 13 and all(sorted(epoch) == rows for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [RowOrder(['a', 'b'], [5, 8], seed=4).locate(i) for i in range(13)]


def test_without_shuffling() -> None:
    order = RowOrder(['a', 'b'], [2, 1], shuffle=False)
    assert [order.locate(i) for i in range(4)] == [(0, 0), (0, 1), (1, 0), (0, 0)]
    with pytest.raises(IndexError, match='counted from 0'):
        order.locate(-1)


def test_weights_are_shares_of_rows() -> None:
    order = RowOrder(['a', 'b'], [5, 8], weights={'a': 3, 'b': 1})
    found = Counter(order.locate(i)[0] for i in range(1000))
    assert found == {0: 750, 1: 250}
    with pytest.raises(ValueError, match='weights mix domains'):
        check_order({'a': 1.0}, False)
