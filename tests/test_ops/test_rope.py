"""Rotary positions against complex numbers and Hugging Face's."""

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from internlm_mm.ops.rope import apply_rope, rope_table


def test_a_turn_of_complex_numbers():
    x = torch.randn(2, 7, 3, 16, dtype=torch.float64)
    positions = torch.randint(100, (2, 7))
    out = apply_rope(x, rope_table(positions, 16, 10_000.0))
    numbers = torch.complex(x[..., :8], x[..., 8:])
    frequency = 10_000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    angle = positions[..., None, None] * frequency
    turned = numbers * torch.polar(torch.ones_like(angle), angle)
    # The angles are float32: 100 radians to 24 bits.
    torch.testing.assert_close(out, torch.cat((turned.real, turned.imag), -1), rtol=0, atol=5e-5)


def test_same_as_transformers():
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=4096)
    positions = torch.randint(4096, (2, 9))
    q = torch.randn(2, 9, 4, 16)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    expected, _ = apply_rotary_pos_emb(q, q, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(apply_rope(q, rope_table(positions, 16, 10_000.0)), expected)


def test_table_and_arithmetic_are_float32():
    positions = torch.tensor([[4095]])
    table = rope_table(positions, 16, 10_000.0)
    assert table.shape == (2, 1, 1, 8) and table.dtype == torch.float32
    x = torch.randn(1, 1, 2, 16).bfloat16()
    out = apply_rope(x, table)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, apply_rope(x.float(), table).bfloat16())


def test_products_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def product(i, j):
        at = [rope_table(torch.tensor([[p]]), 16, 10_000.0) for p in (i, j)]
        return (apply_rope(q, at[0]) * apply_rope(k, at[1])).sum()

    torch.testing.assert_close(product(3, 10), product(103, 110), rtol=0, atol=1e-4)
