"""The head that has no weight of its own."""

import copy

import torch
from torch import nn

from internlm_mm.models.layers import TiedHead


def test_scores_with_the_embedding_and_adds_to_its_gradient() -> None:
    embedding = nn.Embedding(5, 3).double()
    head = TiedHead(embedding)
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(head(x), x @ embedding.weight.T)
    ids = torch.tensor([1, 1, 3])
    (embedding(ids).sum() + head(x).sum()).backward()
    looked_up = torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0], dtype=torch.float64)[:, None].expand(5, 3)
    torch.testing.assert_close(embedding.weight.grad, looked_up + x.sum((0, 1)))


def test_has_no_parameters_and_follows_the_embedding() -> None:
    embedding = nn.Embedding(5, 3)
    head = TiedHead(embedding)
    assert not list(head.parameters()) and not head.state_dict() and not list(head.children())
    embedding.weight = nn.Parameter(torch.ones(5, 3))
    assert head.weight is embedding.weight


def test_a_copy_of_a_model_has_a_head_of_its_own() -> None:
    model = nn.Module()
    model.embedding = nn.Embedding(5, 3)
    model.head = TiedHead(model.embedding)
    other = copy.deepcopy(model)
    assert other.head.weight is other.embedding.weight is not model.embedding.weight
