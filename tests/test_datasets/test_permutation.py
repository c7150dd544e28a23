import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_mm.datasets.permutation import Permutation, hash_key


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 9))
def test_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    permutation = Permutation(size, seed, epoch)
    assert sorted(map(permutation, range(size))) == list(range(size))


@pytest.mark.parametrize('size', [2**16 - 1, 2**16, 2**16 + 1, 99_991])
def test_is_a_bijection_of_odd_sizes(size: int) -> None:
    permutation = Permutation(size, 0)
    assert len({permutation(index) for index in range(size)}) == size


def test_keys_give_unrelated_orders() -> None:
    size = 5000
    orders = [[Permutation(size, *key)(i) for i in range(size)] for key in ((0, 0), (0, 1), (1, 0))]
    correlations = np.corrcoef([range(size), *orders])
    # Of independent orders each is normal with a deviation of 1 / sqrt(size) = 0.014.
    assert np.abs(correlations - np.eye(4)).max() < 0.07


def test_every_place_is_equally_likely() -> None:
    size, trials = 7, 7000
    counts = np.zeros((size, size))
    for seed in range(trials):
        permutation = Permutation(size, seed)
        for index in range(size):
            counts[index, permutation(index)] += 1
    # Each is binomial around 1000 with a deviation of 29.
    assert np.abs(counts - trials / size).max() < 150


def test_large_sizes_cost_no_memory() -> None:
    size = 10**15
    permutation = Permutation(size, 'seed')
    places = [permutation(index) for index in range(1000)]
    assert len(set(places)) == 1000
    assert all(0 <= place < size for place in places)


def test_order_never_changes() -> None:
    # A run that resumes with a later version must go on with the same rows.
    assert [Permutation(10, 1024, 0)(i) for i in range(10)] == [5, 4, 9, 1, 3, 8, 6, 2, 0, 7]


def test_key_is_a_hash_of_its_parts() -> None:
    assert hash_key(1, 'a') == hashlib.blake2b(b'1\0a').digest()
    assert hash_key(1, 23) != hash_key(12, 3)


@pytest.mark.parametrize('index', [-1, 5])
def test_outside_the_range(index: int) -> None:
    with pytest.raises(IndexError, match=r'range\(5\)'):
        Permutation(5, 0)(index)


def test_empty_range() -> None:
    with pytest.raises(ValueError, match='at least 1'):
        Permutation(0, 0)
