"""The kernel that adds to wider sums, against torch's addition, bit by bit."""

import importlib.util

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device'),
    pytest.mark.skipif(not importlib.util.find_spec('triton'), reason='triton is not installed'),
]


@pytest.mark.parametrize('shape', [(1,), (3, 5), (4096,), (129, 1000), (7, 4096, 3)])
@pytest.mark.parametrize(
    ('wide', 'narrow'),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float64, torch.float32),
        (torch.float64, torch.bfloat16),
    ],
)
def test_bits_are_those_of_torch(
    shape: tuple[int, ...], wide: torch.dtype, narrow: torch.dtype
) -> None:
    from internlm_mm.ops.wide_add import wide_add_

    room = torch.zeros(2 * torch.Size(shape).numel(), dtype=wide, device='cuda')
    total = room[: torch.Size(shape).numel()].view(shape)
    total.normal_()
    added = torch.randn(shape, device='cuda').to(narrow)
    added.view(-1)[0] = float('inf')
    expected = total + added
    assert wide_add_(total, added) is total
    assert torch.equal(total, expected)
    assert not room[total.numel() :].any()  # nothing behind the end is written


def test_more_numbers_than_an_int32_counts() -> None:
    from internlm_mm.ops.wide_add import wide_add_

    if torch.cuda.mem_get_info()[0] < 15 * 2**30:
        pytest.skip('needs 13 GiB')
    count = 2**31 + 5
    total = torch.zeros(count, device='cuda')
    added = torch.zeros(count, dtype=torch.bfloat16, device='cuda')
    added[-3:] = 1.5
    wide_add_(total, added)
    assert total[-4:].tolist() == [0.0, 1.5, 1.5, 1.5] and not total[:8].any()


def test_what_does_not_fit_is_refused() -> None:
    from internlm_mm.ops.wide_add import wide_add_

    total = torch.zeros(4, 6, device='cuda')
    with pytest.raises(ValueError, match=r'shapes differ: \[4, 6\] and \[6, 4\]'):
        wide_add_(total, torch.zeros(6, 4, device='cuda'))
    with pytest.raises(ValueError, match='expected contiguous'):
        wide_add_(total, torch.zeros(6, 4, device='cuda').T)
