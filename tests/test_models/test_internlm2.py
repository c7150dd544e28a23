"""InternLM2 against the modeling file that exported folders carry, which packs projections."""

import pytest
import torch
from torch import Tensor, nn

from internlm_mm.checkpoint.remote_code.configuration_internlm2 import InternLM2Config
from internlm_mm.checkpoint.remote_code.modeling_internlm2 import InternLM2ForCausalLM
from internlm_mm.models import InternLM2
from tests.test_models.helpers import SIZES, randomize
from tests.test_models.parity import THEIRS, assert_decodes, assert_same

HEAD_DIM = 8  # of four query heads
NAMES = {
    'embed_tokens': 'model.tok_embeddings',
    'norm': 'model.norm',
    'lm_head': 'output',
    'input_layernorm': 'attention_norm',
    'post_attention_layernorm': 'ffn_norm',
    'self_attn.o_proj': 'attention.wo',
    'mlp.gate_proj': 'feed_forward.w1',
    'mlp.up_proj': 'feed_forward.w3',
    'mlp.down_proj': 'feed_forward.w2',
}


def place_of(name: str, kv_heads: int) -> tuple[str, list[int] | None]:
    """Theirs for one of our names, and which of its rows ours are, if not all of them.

    For every key head: its query heads, the key, the value, a head after the other.
    """
    module, kind = name.rsplit('.', 1)
    if module in NAMES:
        return f'{NAMES[module]}.{kind}', None
    _, layer, rest = module.split('.', 2)
    where = f'model.layers.{layer}'
    if rest in NAMES:
        return f'{where}.{NAMES[rest]}.{kind}', None
    sharing = 4 // kv_heads
    rows = []
    for head in range(kv_heads):
        slots = {'q_proj': range(sharing), 'k_proj': [sharing], 'v_proj': [sharing + 1]}
        for slot in slots[rest.rpartition('.')[2]]:
            start = (head * (sharing + 2) + slot) * HEAD_DIM
            rows += range(start, start + HEAD_DIM)
    return f'{where}.attention.wqkv.{kind}', rows


def gradients_by(kv_heads: int, ours: nn.Module):
    def gradients(theirs: nn.Module) -> dict[str, Tensor]:
        named, found = dict(theirs.named_parameters()), {}
        for name, _ in ours.named_parameters():
            other, rows = place_of(name, kv_heads)
            found[name] = named[other].grad if rows is None else named[other].grad[rows]
        return found

    return gradients


@pytest.mark.parametrize(
    ('kv_heads', 'bias', 'scaling'),
    [
        (2, False, None),
        (1, True, None),
        (4, False, dict(rope_type='dynamic', factor=2.0)),
        (2, False, dict(rope_type='linear', factor=3.0)),
    ],
)
def test_logits_and_every_gradient(kv_heads, bias, scaling):
    config = InternLM2Config(
        **(THEIRS | {'max_position_embeddings': 32}),
        num_key_value_heads=kv_heads,
        bias=bias,
        rope_theta=1_000_000.0,
        rope_scaling=None if scaling is None else dict(scaling),
    )
    theirs = InternLM2ForCausalLM(config)
    if scaling is not None and scaling['rope_type'] == 'dynamic':
        scaling = scaling | {'original_max_position_embeddings': 32}
    ours = randomize(
        InternLM2(**SIZES, num_kv_heads=kv_heads, attention_bias=bias, rope_scaling=scaling)
    )
    named = dict(theirs.named_parameters())
    filled = {name: torch.zeros(len(p), dtype=torch.bool) for name, p in named.items()}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            other, rows = place_of(name, kv_heads)
            rows = range(len(parameter)) if rows is None else rows
            named[other][list(rows)] = parameter
            filled[other][list(rows)] = True
    assert all(rows.all() for rows in filled.values())
    assert_same(ours, theirs, gradients=gradients_by(kv_heads, ours))
    assert_decodes(ours)
