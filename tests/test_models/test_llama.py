"""Llama: transformers' own class in all its variants, rotary kinds included."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from internlm_mm.models import Llama
from tests.test_models.helpers import SIZES, make_batch
from tests.test_models.parity import THEIRS, assert_decodes, assert_same, fill

VARIANTS = {
    'plain': ({}, {}),
    'grouped': (
        dict(num_kv_heads=2, head_dim=16),
        dict(num_key_value_heads=2, head_dim=16),
    ),
    'biases': (dict(attention_bias=True), dict(attention_bias=True)),
    'tied': (dict(tie_word_embeddings=True), dict(tie_word_embeddings=True)),
    'tied and grouped': (
        dict(tie_word_embeddings=True, num_kv_heads=1, norm_eps=1e-6),
        dict(tie_word_embeddings=True, num_key_value_heads=1, rms_norm_eps=1e-6),
    ),
}
# Rotary settings that both take, with 16 positions of training where they differ from all.
ROPES = {
    'theta': dict(rope_type='default'),
    'linear': dict(rope_type='linear', factor=4.0),
    'yarn': dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=16),
    'yarn mscale': dict(
        rope_type='yarn', factor=4.0, original_max_position_embeddings=16, beta_fast=4.0,
        mscale=0.7, mscale_all_dim=0.3, truncate=False,
    ),
    'llama3': dict(
        rope_type='llama3', factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16,
    ),
}  # fmt: skip
DYNAMIC = [
    dict(rope_type='dynamic', factor=1.0),
    dict(rope_type='dynamic', factor=2.5),
]


def theirs_of(**options) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**(THEIRS | options)))


@pytest.mark.parametrize(('mine', 'other'), VARIANTS.values(), ids=VARIANTS)
def test_logits_and_every_gradient(mine, other):
    ours, theirs = Llama(**(SIZES | mine)), theirs_of(**other)
    fill(ours, theirs)
    assert_same(ours, theirs)
    assert_decodes(ours)


@pytest.mark.parametrize('rope', ROPES.values(), ids=ROPES)
def test_rotary_kinds(rope):
    ours = Llama(**SIZES, rope_theta=500.0, rope_scaling=rope)
    theirs = theirs_of(rope_parameters={'rope_theta': 500.0, **rope})
    fill(ours, theirs)
    assert_same(ours, theirs)
    assert_decodes(ours)


@pytest.mark.parametrize('length', [16, 17, 50])
@pytest.mark.parametrize('rope', DYNAMIC, ids=str)
def test_dynamic_below_and_above_the_length_of_training(rope, length):
    scaling = rope | {'original_max_position_embeddings': 16}
    ours = Llama(**SIZES, rope_scaling=scaling)
    theirs = theirs_of(max_position_embeddings=16, rope_parameters={'rope_theta': 10_000.0, **rope})
    fill(ours, theirs)
    assert_same(ours, theirs, length)


@torch.no_grad()
def test_dynamic_while_a_text_grows():
    """A token is rotated by the length of the text when it came, as in transformers."""
    rope = dict(rope_type='dynamic', factor=2.0)
    scaling = rope | {'original_max_position_embeddings': 16}
    ours = Llama(**SIZES, rope_scaling=scaling).eval()
    theirs = theirs_of(
        max_position_embeddings=16, rope_parameters={'rope_theta': 10_000.0, **rope}
    ).eval()
    fill(ours, theirs)
    assert_decodes(ours, length=16)
    ids = make_batch([[30], [30]]).input_ids
    cache, past = ours.make_cache(2, 30), None
    for part in (ids[:, :12], *ids[:, 12:].split(1, dim=1)):
        wanted = theirs(part, past_key_values=past, use_cache=True)
        past = wanted.past_key_values
        found = ours.logits(part, cache=cache)
        torch.testing.assert_close(found, wanted.logits, rtol=1e-4, atol=1e-4)


def test_dynamic_in_packed_rows():
    """Documents are stretched each by its own length, as if alone."""
    scaling = dict(rope_type='dynamic', factor=2.0, original_max_position_embeddings=16)
    ours = Llama(**SIZES, rope_theta=50.0, rope_scaling=scaling)
    theirs = theirs_of(
        max_position_embeddings=16,
        rope_parameters={'rope_theta': 50.0, 'rope_type': 'dynamic', 'factor': 2.0},
    )
    fill(ours, theirs)
    batch = make_batch([[7, 33, 10], [24, 26]])
    total = 0.0
    for row, sizes in enumerate([[7, 33, 10], [24, 26]]):
        for size, end in zip(sizes, torch.tensor(sizes).cumsum(0).tolist(), strict=True):
            part = slice(end - size, end)
            # A new table for each: theirs remembers the longest that it has seen.
            theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
            logits = theirs(batch.input_ids[row : row + 1, part]).logits[0]
            total += torch.nn.functional.cross_entropy(
                logits, batch.labels[row, part], reduction='sum'
            )
    total.backward()
    loss = ours(batch)['loss']
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=0)
    loss.backward()
    for name, parameter in theirs.named_parameters():
        found = ours.get_parameter(name.removeprefix('model.')).grad
        assert (found - parameter.grad).norm() <= 2e-5 * parameter.grad.norm(), name
    with torch.no_grad():
        plain = Llama(**SIZES, rope_theta=50.0)
        plain.load_state_dict(ours.state_dict())
        assert abs(plain(batch)['loss'] - loss) > 1e-3 * loss  # so lengths matter


def test_an_unknown_rotary_kind():
    with pytest.raises(ValueError, match=r"rope_type='lama3' is unknown.*'llama3'"):
        Llama(**SIZES, rope_scaling={'rope_type': 'lama3'})


def test_a_tied_head_has_no_parameter_of_its_own():
    tied, apart = Llama(**SIZES, tie_word_embeddings=True), Llama(**SIZES)
    assert tied.lm_head.weight is tied.embed_tokens.weight
    names = {name for name, _ in apart.named_parameters()} - {'lm_head.weight'}
    assert {name for name, _ in tied.named_parameters()} == names
    assert set(tied.state_dict()) == names
    assert len(list(tied.parameters())) == len(names)


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
