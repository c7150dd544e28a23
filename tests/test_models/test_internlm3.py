"""InternLM3 against transformers' Llama, which computes the same."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from internlm_mm.models import InternLM3
from tests.test_models.helpers import SIZES
from tests.test_models.parity import THEIRS, assert_decodes, assert_same, fill


def test_logits_and_every_gradient():
    """With fewer positions of training than of the row."""
    scaling = dict(rope_type='dynamic', factor=6.0)
    ours = InternLM3(
        **SIZES,
        num_kv_heads=2,
        head_dim=16,
        rope_scaling=scaling | {'original_max_position_embeddings': 32},
    )
    config = LlamaConfig(
        **(THEIRS | {'max_position_embeddings': 32}),
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={'rope_theta': 50_000_000.0, **scaling},
    )
    theirs = LlamaForCausalLM(config)
    fill(ours, theirs)
    assert_same(ours, theirs)
    assert_decodes(ours)


def test_no_biases():
    with torch.device('meta'):
        names = [name for name, _ in InternLM3(**SIZES, num_kv_heads=2).named_parameters()]
    assert not [name for name in names if name.endswith('bias')]
