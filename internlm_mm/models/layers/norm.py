"""Normalisation layer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from internlm_mm.ops import rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learnt scale, statistics in float32.

    Args:
        hidden_size: Width of the vectors.
        eps: Added to the mean square.
    """

    norm: Callable[[Tensor, Tensor, float], Tensor]

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps
        self.norm = rms_norm  # the seam: kernels replace it

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension. x, result: [..., hidden]."""
        return self.norm(x, self.weight, self.eps)
