"""The head of a model whose head is its embedding."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class TiedHead(nn.Module):
    """A linear layer that has no weight of its own: it uses an embedding's.

    `weight` is looked up in the embedding whenever it is asked for, so that it is what the
    embedding has at that moment: whole while layers compute, this rank's rows under tensor
    parallelism. The parameter has one name in the model, the embedding's.

    Args:
        embedding: Whose table it is.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # not as a module, whose parameters would be listed twice

    @property
    def lender(self) -> nn.Embedding:
        """The module whose parameter this one uses."""
        return self._embedding[0]

    @property
    def weight(self) -> Tensor:
        """The embedding's table, [vocab, hidden]."""
        return self._embedding[0].weight

    def forward(self, x: Tensor) -> Tensor:
        """Score every token. x: [..., hidden]; result: [..., vocab]."""
        return F.linear(x, self.weight)
