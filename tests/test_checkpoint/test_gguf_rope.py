"""Rotary embeddings in llama.cpp's words; what they compute is compared in test_gguf.py."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from internlm_mm.checkpoint.gguf_rope import head_dim_of, rope_metadata

SIZES = dict(hidden_size=512, num_attention_heads=8, max_position_embeddings=4096)
LLAMA3 = dict(
    rope_type='llama3',
    rope_theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=512,
)


def test_default():
    keys, divisors = rope_metadata(SIZES | {'rope_theta': 5000})
    assert keys == {'llama.rope.dimension_count': 64, 'llama.rope.freq_base': 5000.0}
    assert divisors is None
    assert rope_metadata(SIZES)[0]['llama.rope.freq_base'] == 10_000.0


def test_head_dim():
    assert head_dim_of(SIZES) == 64
    assert head_dim_of(SIZES | {'head_dim': 80}) == 80


@pytest.mark.parametrize('key', ['rope_parameters', 'rope_scaling'])
def test_linear_in_either_spelling(key):
    kind = 'rope_type' if key == 'rope_parameters' else 'type'
    keys, divisors = rope_metadata(SIZES | {key: {kind: 'linear', 'factor': 2}})
    assert keys['llama.rope.scaling.type'] == 'linear'
    assert keys['llama.rope.scaling.factor'] == 2.0
    assert divisors is None


def test_llama3_divisors_equal_transformers():
    config = LlamaConfig(**SIZES, rope_parameters=LLAMA3)
    expected, _ = ROPE_INIT_FUNCTIONS['llama3'](config, 'cpu')
    keys, divisors = rope_metadata(SIZES | {'rope_parameters': LLAMA3})
    assert 'llama.rope.scaling.type' not in keys  # else llama.cpp would scale twice
    base = 500_000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    torch.testing.assert_close((base / divisors).float(), expected, rtol=1e-6, atol=0)
    assert divisors[0] == 1 and divisors[-1] == 8


@pytest.mark.parametrize(
    'extra',
    [
        {},
        {'attention_factor': 0.7},
        {'mscale': 0.8, 'mscale_all_dim': 1.2},
        {'beta_fast': 32, 'beta_slow': 1},
    ],
    ids=str,
)
def test_yarn_attention_factor_equals_transformers(extra):
    rope = dict(
        rope_type='yarn',
        rope_theta=10_000.0,
        factor=4.0,
        original_max_position_embeddings=1024,
        **extra,
    )
    _, expected = ROPE_INIT_FUNCTIONS['yarn'](LlamaConfig(**SIZES, rope_parameters=rope), 'cpu')
    keys, _ = rope_metadata(SIZES | {'rope_parameters': rope})
    assert keys['llama.rope.scaling.original_context_length'] == 1024
    computed = keys['llama.rope.scaling.attn_factor'] * (1 + 0.1 * math.log(4.0))
    assert computed == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ('rope', 'message'),
    [
        ({'rope_type': 'dynamic', 'factor': 2.0}, "rope_type='dynamic' cannot be told"),
        ({'rope_type': 'longrope', 'factor': 2.0}, "rope_type='longrope' cannot be told"),
        ({'rope_type': 'yarn', 'factor': 2.0, 'beta_fast': 16}, 'beta_fast=16.*only 32'),
        ({'rope_type': 'yarn', 'factor': 2.0, 'truncate': False}, 'truncate=False.*only True'),
    ],
    ids=str,
)
def test_what_llama_cpp_has_not(rope, message):
    with pytest.raises(ValueError, match=message):
        rope_metadata(SIZES | {'rope_parameters': rope})
