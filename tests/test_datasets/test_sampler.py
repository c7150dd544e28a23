import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_mm.datasets.sampler import BatchSizeRampup, check_division, micro_batches


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_ranks_are_disjoint_and_cover_the_step(
    first: int, micro: int, ranks: int, accumulation: int
) -> None:
    size = micro * ranks * accumulation
    rows = []
    for rank in range(ranks):
        shares = list(micro_batches(first, size, micro, rank, ranks))
        assert [len(share) for share in shares] == [micro] * accumulation
        rows += [row for share in shares for row in share]
    assert rows == list(range(first, first + size))


def test_rampup() -> None:
    rampup = BatchSizeRampup(start=4, increment=4, interval=3)
    sizes = [rampup.batch_size(iteration, 14) for iteration in range(12)]
    assert sizes == [4, 4, 4, 8, 8, 8, 12, 12, 12, 14, 14, 14]
    assert rampup.stages(14) == [4, 8, 12, 14]
    assert rampup.stages(12) == [4, 8, 12]


@pytest.mark.parametrize('key', ['start', 'increment', 'interval'])
def test_rampup_of_nothing(key: str) -> None:
    with pytest.raises(ValueError, match=f'rampup.{key} must be at least 1, got 0'):
        BatchSizeRampup(**(dict(start=1, increment=1, interval=1) | {key: 0}))


@pytest.mark.parametrize(
    ('size', 'micro', 'ranks', 'message'),
    [
        (10, 2, 3, r'global_batch_size=10 .* micro_batch_size=2 on 3 .* example 6 or 12'),
        (4, 2, 3, 'a multiple of 6, for example 6$'),
        (0, 2, 3, 'must be at least 1'),
        (4, 0, 3, 'must be at least 1'),
    ],
)
def test_steps_that_do_not_divide(size: int, micro: int, ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_division(size, micro, ranks)


def test_steps_that_divide() -> None:
    check_division(12, 2, 3)
