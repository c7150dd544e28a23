"""The cache by hand; that generation with it is right is tested where generation is."""

import pytest
import torch

from internlm_mm.ops.kv_cache import KVCache


def make(capacity=6):
    return KVCache(['0', '1'], 2, capacity, 1, 1, torch.float32, 'cpu')


def test_rows_of_different_lengths():
    cache = make()
    # Row 0 holds three tokens, row 1 holds two and one of padding.
    first = cache.extend(torch.tensor([[0, 1, 2], [0, 1, 2]]))['1']
    values = torch.tensor([[1.0, 2, 3], [4, 5, 99]]).reshape(2, 3, 1, 1)
    first.write(values, values)
    second = cache.extend(torch.tensor([[3], [2]]))['1']
    k, v = second.write(torch.full((2, 1, 1, 1), 7.0), torch.full((2, 1, 1, 1), 8.0))
    assert k.flatten(1).tolist() == [[1, 2, 3, 7], [4, 5, 7, 0]]
    assert v.flatten(1).tolist() == [[1, 2, 3, 8], [4, 5, 8, 0]]
    assert second.mask.flatten(1).int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert cache.length == 4


def test_layers_do_not_share():
    cache = make()
    layers = cache.extend(torch.tensor([[0], [0]]))
    layers['0'].write(torch.ones(2, 1, 1, 1), torch.ones(2, 1, 1, 1))
    assert layers['1'].keys.abs().max() == 0


def test_full():
    cache = make(capacity=2)
    cache.extend(torch.tensor([[0, 1], [0, 1]]))
    with pytest.raises(ValueError, match='3 tokens do not fit in a KV cache of 2'):
        cache.extend(torch.tensor([[2], [2]]))
