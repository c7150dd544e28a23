"""Qwen3 against transformers' own class."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from internlm_mm.models import Qwen3
from tests.test_models.helpers import SIZES
from tests.test_models.parity import THEIRS, assert_decodes, assert_same, fill

VARIANTS = {
    'plain': {},
    'tied': dict(tie_word_embeddings=True),
    'biases': dict(attention_bias=True),
}


@pytest.mark.parametrize('options', VARIANTS.values(), ids=VARIANTS)
def test_logits_and_every_gradient(options):
    ours = Qwen3(**SIZES, num_kv_heads=2, head_dim=12, **options)
    config = Qwen3Config(
        **(THEIRS | {'rms_norm_eps': 1e-6}),
        num_key_value_heads=2,
        head_dim=12,
        rope_parameters={'rope_type': 'default', 'rope_theta': 1_000_000.0},
        **options,
    )
    theirs = Qwen3ForCausalLM(config)
    fill(ours, theirs)
    assert_same(ours, theirs)
    assert_decodes(ours)


def test_norms_are_as_wide_as_a_head_and_start_at_1():
    model = Qwen3(**SIZES, num_kv_heads=2, head_dim=12)
    for layer in model.layers.values():
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            assert norm.weight.shape == (12,) and norm.eps == 1e-6
    name = 'layers.1.self_attn.k_norm.weight'
    tensor = torch.empty(12)
    model.init_parameter(name, tensor, torch.Generator())
    assert torch.equal(tensor, torch.ones(12))
