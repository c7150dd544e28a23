"""The attention layer: positions, the seam and shared key heads."""

import torch

from internlm_mm.models.layers import SelfAttention
from internlm_mm.ops import rope_table


def layer(**changes):
    return SelfAttention(
        **(dict(hidden_size=16, num_heads=4, num_kv_heads=2, head_dim=8, bias=True) | changes)
    )


def test_shared_key_heads_equal_repeated_ones():
    grouped, full = layer(), layer(num_kv_heads=4)
    for name in ('q_proj', 'o_proj'):
        getattr(full, name).load_state_dict(getattr(grouped, name).state_dict())
    for name in ('k_proj', 'v_proj'):
        for kind in ('weight', 'bias'):
            heads = getattr(getattr(grouped, name), kind).unflatten(0, (2, 8))
            repeated = heads.repeat_interleave(2, dim=0).flatten(0, 1)
            getattr(getattr(full, name), kind).data.copy_(repeated)
    x = torch.randn(2, 6, 16)
    rope = rope_table(torch.arange(6).expand(2, 6), 8, 10_000.0)
    torch.testing.assert_close(grouped(x, rope), full(x, rope))


def test_only_distances_between_tokens_matter():
    attention, x = layer(), torch.randn(1, 6, 16)
    at = [rope_table(torch.arange(start, start + 6)[None], 8, 10_000.0) for start in (0, 50)]
    torch.testing.assert_close(attention(x, at[0]), attention(x, at[1]), rtol=1e-4, atol=1e-5)
    spread = rope_table(2 * torch.arange(6)[None], 8, 10_000.0)
    assert (attention(x, at[0]) - attention(x, spread)).abs().max() > 1e-3


def test_the_seam_gets_heads_counted_from_the_projections():
    attention = layer()
    # What a rank of two holds: half of every projection.
    attention.q_proj = torch.nn.Linear(16, 16)
    attention.k_proj = attention.v_proj = torch.nn.Linear(16, 8)
    attention.o_proj = torch.nn.Linear(16, 16)
    shapes = []

    def attend(q, k, v, documents):
        shapes.append((q.shape, k.shape, v.shape, documents))
        return q

    attention.attend = attend
    rope = rope_table(torch.arange(6).expand(2, 6), 8, 10_000.0)
    attention(torch.randn(2, 6, 16), rope)
    assert shapes == [((2, 6, 2, 8), (2, 6, 1, 8), (2, 6, 1, 8), None)]


def test_heads_are_normalised_one_by_one_before_they_turn():
    attention = layer(norm_eps=0.1)
    attention.q_norm.weight.data.normal_()
    attention.k_norm.weight.data.normal_()
    seen = []

    def attend(q, k, v, documents):
        seen.extend((q, k, v))
        return q

    attention.attend = attend
    x = torch.randn(1, 3, 16)
    still = rope_table(torch.zeros(1, 3, dtype=torch.int64), 8, 10_000.0)
    attention(x, still)
    for found, proj, norm in (
        (seen[0], attention.q_proj, attention.q_norm),
        (seen[1], attention.k_proj, attention.k_norm),
    ):
        heads = proj(x).unflatten(-1, (-1, 8))
        size = (heads.square().sum(-1, keepdim=True) / 8 + 0.1).sqrt()
        torch.testing.assert_close(found, heads / size * norm.weight)
    torch.testing.assert_close(seen[2], attention.v_proj(x).unflatten(-1, (2, 8)))


def test_which_projections_have_biases():
    def biases(**changes):
        return [name for name, _ in layer(**changes).named_parameters() if name.endswith('bias')]

    assert biases() == ['q_proj.bias', 'k_proj.bias', 'v_proj.bias', 'o_proj.bias']
    assert biases(output_bias=False) == ['q_proj.bias', 'k_proj.bias', 'v_proj.bias']
    assert biases(bias=False) == []
    assert biases(bias=False, output_bias=True) == ['o_proj.bias']
