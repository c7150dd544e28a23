from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_mm.datasets.mixture import Mixture, check_names


@pytest.mark.parametrize(
    ('weights', 'block', 'quotas'),
    [
        ([0.7, 0.2, 0.1], 1000, [700, 200, 100]),
        ([7, 2, 1], 1000, [700, 200, 100]),
        ([1], 1000, [1000]),
        ([0.999, 0.001], 1000, [999, 1]),
        ([0.9995, 0.0005], 10_000, [9995, 5]),
    ],
)
def test_every_block_has_exact_proportions(
    weights: list[float], block: int, quotas: list[int]
) -> None:
    mixture = Mixture(weights, seed=3)
    assert mixture.block == block
    for start in (0, 5 * block):
        counts = Counter(mixture.locate(index)[0] for index in range(start, start + block))
        assert [counts[domain] for domain in range(len(weights))] == quotas


@given(st.lists(st.floats(0.05, 1), min_size=1, max_size=8), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_proportions_are_near_the_weights(weights: list[float], seed: int) -> None:
    mixture = Mixture(weights, seed)
    assert sum(mixture.quotas) == mixture.block
    for quota, weight in zip(mixture.quotas, weights, strict=True):
        assert quota / mixture.block == pytest.approx(weight / sum(weights), rel=0.01)


def test_rows_of_a_domain_are_numbered_without_gaps() -> None:
    mixture = Mixture([0.5, 0.3, 0.2], seed=1)
    numbers = defaultdict(list)
    for index in range(3 * mixture.block):
        domain, number = mixture.locate(index)
        numbers[domain].append(number)
    for found in numbers.values():
        assert sorted(found) == list(range(len(found)))


def test_domains_are_well_mixed_inside_a_block() -> None:
    mixture = Mixture([0.5, 0.5], seed=1)
    for start in range(0, 2000, 100):
        first = sum(mixture.locate(index)[0] == 0 for index in range(start, start + 100))
        assert 25 <= first <= 75  # 50 with a deviation of 5


def test_seed_and_block_change_the_order() -> None:
    def order(seed: int, start: int) -> list[int]:
        mixture = Mixture([0.5, 0.5], seed)
        return [mixture.locate(index)[0] for index in range(start, start + 100)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1000)


@pytest.mark.parametrize('weights', [[], [0.5, 0], [1, -1], [float('nan')], [float('inf'), 1]])
def test_weights_that_are_none(weights: list[float]) -> None:
    with pytest.raises(ValueError, match='positive numbers'):
        Mixture(weights)


def test_weight_too_small() -> None:
    with pytest.raises(ValueError, match='leave the domain out'):
        Mixture([1, 1e-9])


def test_unknown_name() -> None:
    check_names(['web'], ['web', 'code'], 'weights')
    with pytest.raises(ValueError, match=r"weights names .* 'cod'\. Did you mean 'code'\?"):
        check_names({'cod': 1.0}, ['web', 'code'], 'weights')
