"""Pieces of the layout that have an independent meaning of their own."""

import pytest
import torch

from internlm_mm.checkpoint.internlm_layout import family_name, split_evenly, to_halves, to_pairs
from internlm_mm.models import Llama
from internlm_mm.ops import apply_rope, rope_table


def test_rotary_pairs_side_by_side_turn_as_ours_do():
    # Scores of complex rotation of neighbouring numbers are those of ours after the permutation.

    generator = torch.Generator().manual_seed(0)
    seq, width = 5, 8
    q, k = torch.randn(2, seq, 2 * width, generator=generator).unbind()  # two heads
    angle = torch.arange(seq)[:, None] * 10_000 ** -(torch.arange(0, width, 2) / width)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]

    def complex_rotary(x):
        pairs = torch.view_as_complex(x.reshape(seq, 2, width // 2, 2))
        return torch.view_as_real(pairs * turn).flatten(2)

    def ours(x):
        heads = to_halves(x.T, width).T.reshape(1, seq, 2, width)
        table = rope_table(torch.arange(seq)[None], width, 10_000.0)
        return apply_rope(heads, table)[0]

    scores = torch.einsum('shd,thd->hst', complex_rotary(q), complex_rotary(k))
    torch.testing.assert_close(torch.einsum('shd,thd->hst', ours(q), ours(k)), scores)
    assert torch.equal(to_pairs(to_halves(q.T, width), width), q.T)


@pytest.mark.parametrize(
    ('layers', 'stages', 'chunks', 'expected'),
    [
        (4, 2, 1, [[range(0, 2)], [range(2, 4)]]),
        (5, 3, 1, [[range(0, 1)], [range(1, 3)], [range(3, 5)]]),
        (8, 2, 2, [[range(0, 2), range(4, 6)], [range(2, 4), range(6, 8)]]),
    ],
)
def test_layers_of_stages(layers, stages, chunks, expected):
    assert split_evenly(layers, stages, chunks) == expected


@pytest.mark.parametrize('layers', [1, 7])
def test_layers_that_do_not_divide(layers):
    with pytest.raises(ValueError, match=f'{layers} layers do not divide into 2 x 2 parts'):
        split_evenly(layers, 2, 2)


@pytest.mark.parametrize('kind', ['Llama', 'internlm_mm.models.llama.Llama', Llama])
def test_family_names(kind):
    assert family_name({'type': kind}) == 'Llama'
