"""Rotary positions against complex numbers and Hugging Face's; every kind against transformers'."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from internlm_mm.ops.rope import ROPE_TYPES, apply_rope, read_scaling, rope_table

LONGEST = 256
"""Positions of the model in the tests of kinds; of training, where that is another number, 64."""

KINDS = {
    'default': dict(rope_type='default'),
    'linear': dict(rope_type='linear', factor=4.0),
    'linear 1': dict(rope_type='linear', factor=1.0),
    'dynamic': dict(rope_type='dynamic', factor=2.5),
    'dynamic 1': dict(rope_type='dynamic', factor=1.0),
    'yarn': dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=64),
    'yarn 1': dict(rope_type='yarn', factor=1.0, original_max_position_embeddings=64),
    'yarn bounds': dict(
        rope_type='yarn', factor=8.0, original_max_position_embeddings=64, beta_fast=9, beta_slow=2
    ),
    'yarn exact': dict(
        rope_type='yarn', factor=4.0, original_max_position_embeddings=64, truncate=False
    ),
    'yarn narrow': dict(  # both bounds in one channel
        rope_type='yarn', factor=4.0, original_max_position_embeddings=64, beta_fast=1.01,
        beta_slow=1.0, truncate=False,
    ),
    'yarn factor': dict(
        rope_type='yarn', factor=4.0, original_max_position_embeddings=64, attention_factor=0.7
    ),
    'yarn mscale': dict(
        rope_type='yarn', factor=40.0, original_max_position_embeddings=64, mscale=1.0,
        mscale_all_dim=0.8,
    ),
    'yarn one mscale': dict(
        rope_type='yarn', factor=40.0, original_max_position_embeddings=64, mscale=0.5
    ),
    'llama3': dict(
        rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
    'llama3 wide': dict(
        rope_type='llama3', factor=32.0, low_freq_factor=0.5, high_freq_factor=9.0,
        original_max_position_embeddings=100,
    ),
}  # fmt: skip


def theirs_of(scaling: dict, theta: float = 10_000.0, head_dim: int = 32) -> LlamaRotaryEmbedding:
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=LONGEST,
        rope_parameters={'rope_theta': theta, **scaling},
    )
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize('length', [1, 63, 65, LONGEST, LONGEST + 1, 5000])
@pytest.mark.parametrize('scaling', KINDS.values(), ids=KINDS)
@pytest.mark.parametrize('theta', [10_000.0, 5e7])
def test_every_kind_is_that_of_transformers(scaling: dict, length: int, theta: float) -> None:
    positions = torch.arange(length).expand(1, length)
    cos, sin = theirs_of(scaling, theta)(torch.zeros(1), positions)
    kind = read_scaling(scaling, LONGEST, 32)
    lengths = torch.full((1, 1), length)
    ours = rope_table(positions, 32, theta, kind, lengths)
    # Angles are products in fp32: one rounding of a frequency is worth this much at the end.
    tolerance = 1e-6 + 2.0**-22 * length
    torch.testing.assert_close(ours[0], cos[..., :16], rtol=0, atol=tolerance)
    torch.testing.assert_close(ours[1], sin[..., :16], rtol=0, atol=tolerance)


@pytest.mark.parametrize('length', [None, 1, LONGEST, LONGEST + 1, 7000])
@pytest.mark.parametrize('scaling', KINDS.values(), ids=KINDS)
def test_frequencies_are_those_of_transformers(scaling: dict, length: int | None) -> None:
    if scaling['rope_type'] == 'default':
        return
    config = theirs_of(scaling).config
    expected, factor = ROPE_INIT_FUNCTIONS[scaling['rope_type']](config, seq_len=length)
    kind = read_scaling(scaling, LONGEST, 32)
    lengths = None if length is None else torch.tensor(length)
    found = kind.frequencies(32, 10_000.0, lengths, torch.device('cpu'))
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    assert kind.scale == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize('kinds', [('linear 1', 'default'), ('dynamic', 'default')])
def test_what_a_kind_leaves_as_it_is(kinds: tuple[str, str]) -> None:
    positions = torch.arange(LONGEST)[None]
    one, other = (
        rope_table(positions, 32, 10_000.0, read_scaling(KINDS[kind], LONGEST, 32), positions + 1)
        for kind in kinds
    )
    assert torch.equal(one, other)


def test_dynamic_follows_the_document_of_each_token() -> None:
    """Tokens of short and long documents in one row have the table of their own document alone."""
    kind = read_scaling(KINDS['dynamic'], 8, 32)
    positions = torch.cat([torch.arange(n) for n in (5, 20, 9)])[None]
    lengths = torch.tensor([5] * 5 + [20] * 20 + [9] * 9)[None]
    packed = rope_table(positions, 32, 10_000.0, kind, lengths)
    alone = [
        rope_table(torch.arange(n)[None], 32, 10_000.0, kind, torch.tensor([[n]]))
        for n in (5, 20, 9)
    ]
    assert torch.equal(packed, torch.cat(alone, dim=2))
    plain = rope_table(positions, 32, 10_000.0)
    assert torch.equal(packed[:, :, :5], plain[:, :, :5])
    assert not torch.allclose(packed[:, :, 5:25], plain[:, :, 5:25], atol=1e-2)
    # Without lengths all count as short.
    assert torch.equal(rope_table(positions, 32, 10_000.0, kind), plain)


def test_dynamic_counts_from_the_length_that_is_said() -> None:
    said = dict(rope_type='dynamic', factor=2.0, original_max_position_embeddings=64)
    assert read_scaling(said, LONGEST, 32).original_length == 64
    assert read_scaling(KINDS['dynamic'], LONGEST, 32).original_length == LONGEST
    base = 10_000.0 * (2 * 200 / 64 - 1) ** (32 / 30)
    found = rope_table(torch.arange(200)[None], 32, 10_000.0, read_scaling(said, LONGEST, 32),
                       torch.tensor([[200]]))  # fmt: skip
    torch.testing.assert_close(
        found, rope_table(torch.arange(200)[None], 32, base), rtol=0, atol=1e-4
    )


def test_default_and_none_are_plain() -> None:
    assert read_scaling(None, 8, 32) is None
    assert read_scaling({'rope_type': 'default'}, 8, 32) is None


@pytest.mark.parametrize(
    ('scaling', 'message'),
    [
        ({}, r"has no 'rope_type'\. Valid: default, linear, dynamic, yarn, llama3"),
        (dict(type='linear', factor=2.0), "has no 'rope_type'"),
        (dict(rope_type='yarrn'), r"rope_type='yarrn' is unknown\. Did you mean 'yarn'"),
        (dict(rope_type='longrope'), "rope_type='longrope' is unknown"),
        (dict(rope_type='linear'), "'linear' needs 'factor'"),
        (dict(rope_type='linear', factor=None), "'linear' needs 'factor'"),
        (dict(rope_type='default', factor=2.0), r"factor=2.0: 'default' has no such key"),
        (
            dict(rope_type='yarn', factor=2.0, original_max_position_embeddings=8, beta_fat=3),
            r"beta_fat=3: 'yarn' has no such key\. Did you mean 'beta_fast'",
        ),
        (dict(rope_type='yarn', factor=2.0), "'yarn' needs 'original_max_position_embeddings'"),
        (
            dict(rope_type='llama3', factor=2.0, original_max_position_embeddings=8),
            "'llama3' needs 'low_freq_factor'",
        ),
        (dict(rope_type='linear', factor=0.5), 'factor=0.5 must be a number of at least 1'),
        (dict(rope_type='linear', factor='2'), "factor='2' must be a number of at least 1"),
        (dict(rope_type='linear', factor=True), 'factor=True must be a number'),
        (dict(rope_type='linear', factor=math.nan), 'factor=nan must be a number'),
        (
            dict(rope_type='dynamic', factor=2.0, original_max_position_embeddings=8.0),
            'original_max_position_embeddings=8.0 must be a positive integer',
        ),
        (
            dict(rope_type='linear', factor=2.0, rope_theta=5.0),
            r'rope_scaling\.rope_theta=5.0: give it as rope_theta=5.0',
        ),
        (KINDS['yarn'] | dict(truncate=1), 'truncate=1 must be True or False'),
        (KINDS['yarn'] | dict(mscale=-1), 'mscale=-1 must be a positive number'),
        (KINDS['yarn'] | dict(beta_slow=33), 'beta_slow=33 of .* smaller than beta_fast=32.0'),
        (
            KINDS['llama3'] | dict(high_freq_factor=1.0),
            'low_freq_factor=1.0 of .* smaller than high_freq_factor=1.0',
        ),
    ],
)
def test_what_is_refused(scaling: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_scaling(scaling, 64, 32)


def test_narrow_heads_and_dynamic() -> None:
    with pytest.raises(ValueError, match='needs head_dim of 4 or more, not 2'):
        read_scaling(KINDS['dynamic'], 64, 2)


def test_all_kinds_are_tested() -> None:
    assert {scaling['rope_type'] for scaling in KINDS.values()} == set(ROPE_TYPES)
    assert set(ROPE_TYPES) - {'default'} < set(ROPE_INIT_FUNCTIONS)


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
