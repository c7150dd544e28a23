"""Llama: what differs from InternLM. Equality with transformers is in test_llama_format.py."""

import pytest
import torch

from internlm_mm.models import Llama
from tests.test_models.helpers import SIZES


def test_parameter_count_of_llama_2_7b():
    with torch.device('meta'):
        model = Llama(
            vocab_size=32_000,
            hidden_size=4096,
            intermediate_size=11_008,
            num_layers=32,
            num_heads=32,
        )
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    assert not [name for name, _ in model.named_parameters() if name.endswith('bias')]


def test_shared_key_heads():
    model = Llama(**SIZES, num_kv_heads=2, head_dim=6)
    assert model.layers['0'].self_attn.q_proj.weight.shape == (24, 32)
    assert model.layers['0'].self_attn.k_proj.weight.shape == (12, 32)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(num_kv_heads=3), 'num_kv_heads=3 does not divide num_heads=4'),
        (dict(head_dim=5), 'head_dim=5 is odd'),
        (dict(num_heads=5), 'num_heads=5 does not divide hidden_size=32'),
        (dict(num_kv_heads=0), 'num_kv_heads=0 must be a positive integer'),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        Llama(**(SIZES | changes))
