"""Layers one after the other, whatever they are."""

import torch
from torch import nn

from internlm_mm.ops import project


def test_each_layer_reads_the_same_input() -> None:
    layers = [nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 5), nn.ReLU())]
    x = torch.randn(4, 3)
    first, second = project(x, layers)
    assert torch.equal(first, layers[0](x)) and torch.equal(second, layers[1](x))
