"""The gate of the feed-forward layer."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, https://arxiv.org/abs/2002.05202. All [..., intermediate]."""
    return F.silu(gate) * up
