"""Bytes that are turned on a GPU, beside torch's own copy."""

import importlib.util

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device'),
    pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='no Triton'),
]


@pytest.mark.parametrize('dtype', [torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize('shape', [(1, 1), (128, 128), (4096, 11008), (257, 1000), (3, 70_001)])
def test_every_byte_goes_to_its_place(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from internlm_mm.ops.turned import turn

    matrix = torch.randint(0, 255, shape, dtype=torch.uint8, device='cuda').view(dtype)
    found = turn(matrix)
    assert found.dtype == dtype and found.is_contiguous()
    assert torch.equal(found.view(torch.uint8), matrix.view(torch.uint8).t())


def test_more_bytes_than_32_bits_count() -> None:
    from internlm_mm.ops.turned import turn

    matrix = torch.zeros(70_000, 32_768, dtype=torch.uint8, device='cuda')
    matrix[-1, -2] = 7
    found = turn(matrix)
    assert found[-2, -1] == 7
    assert found.sum(dtype=torch.int64) == 7


@pytest.mark.parametrize('of', ['halves', 'columns', 'cube', 'host'])
def test_what_is_no_matrix_of_bytes(of: str) -> None:
    from internlm_mm.ops.turned import turn

    matrix = torch.zeros(4, 6, dtype=torch.uint8, device='cuda')
    wrong = {
        'halves': matrix.half(),
        'columns': matrix.t(),
        'cube': matrix[None],
        'host': matrix.cpu(),
    }[of]
    with pytest.raises(ValueError, match='expected a contiguous matrix of bytes'):
        turn(wrong)
