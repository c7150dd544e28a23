"""Names and packings of foreign files, both ways."""

import pytest
import torch

from internlm_mm.utils.weight_layout import Packing, Rule, Stored, WeightLayout

PAIR = Packing(lambda parts: torch.cat(list(parts)), lambda tensor: tensor.chunk(2))
LAYOUT = WeightLayout(
    (
        Rule(('embed.',), 'tok.'),
        Rule(('layers.{}.a.', 'layers.{}.b.'), 'blocks.{}.ab.', PAIR),
        Rule(('layers.{}.norm.',), 'blocks.{}.n.'),
        Rule(('layers.{}.mlp.{}.',), 'blocks.{}.experts.{}.'),
        Rule(('norm.',), 'n.'),
    ),
    ignored=('inv_freq', 'steps'),
)


@pytest.mark.parametrize(
    ('ours', 'theirs', 'part'),
    [
        ('embed.weight', 'tok.weight', 0),
        ('layers.11.a.weight', 'blocks.11.ab.weight', 0),
        ('layers.11.b.bias', 'blocks.11.ab.bias', 1),
        ('layers.0.norm.weight', 'blocks.0.n.weight', 0),
        ('layers.3.mlp.7.w', 'blocks.3.experts.7.w', 0),
        ('norm.weight', 'n.weight', 0),
    ],
)
def test_names_both_ways(ours, theirs, part):
    stored = LAYOUT.stored(ours)
    assert (stored.name, stored.part) == (theirs, part)
    assert LAYOUT.ours(theirs)[ours] == stored


def test_packed_tensors():
    whole = torch.arange(6)
    parts = LAYOUT.ours('blocks.2.ab.weight')
    assert list(parts) == ['layers.2.a.weight', 'layers.2.b.weight']
    taken = [stored.take(whole) for stored in parts.values()]
    assert [part.tolist() for part in taken] == [[0, 1, 2], [3, 4, 5]]
    assert LAYOUT.packing('blocks.2.ab.weight') is PAIR
    assert torch.equal(PAIR.join(taken), whole)
    assert LAYOUT.packing('n.weight') is None
    assert Stored('n.weight', None, 0).take(whole) is whole


def test_groups_are_in_the_order_of_ours():
    names = ['norm.w', 'layers.1.b.w', 'layers.1.a.w', 'layers.0.norm.w']
    assert LAYOUT.groups(names) == {
        'n.w': ['norm.w'],
        'blocks.1.ab.w': ['layers.1.a.w', 'layers.1.b.w'],  # as they are packed
        'blocks.0.n.w': ['layers.0.norm.w'],
    }


def test_half_of_a_packed_tensor():
    with pytest.raises(ValueError, match=r"'layers\.1\.b\.w' is missing: it is stored together"):
        LAYOUT.groups(['layers.1.a.w'])


def test_ignored_names():
    assert LAYOUT.ours('blocks.0.rotary.inv_freq') == {} == LAYOUT.ours('steps')


@pytest.mark.parametrize('name', ['layers.1.c.w', 'layers.x.a.w', 'normal', 'blocks.1.ab.w'])
def test_names_of_ours_without_a_place(name):
    with pytest.raises(ValueError, match=rf"'{name}' has no place.* begin with embed\., layers"):
        LAYOUT.stored(name)


def test_unknown_names_of_theirs():
    with pytest.raises(ValueError, match=r"'layers\.1\.a\.w' is unknown.*begin with tok\., blocks"):
        LAYOUT.ours('layers.1.a.w')


def test_renaming_alone():
    layout = WeightLayout.of_names({'a.': 'model.a.', 'head.': 'head.'}, ('freq',))
    assert layout.stored('a.b.a.c').name == 'model.a.b.a.c'
    assert list(layout.ours('head.w')) == ['head.w']
    assert layout.ours('model.a.freq') == {}
