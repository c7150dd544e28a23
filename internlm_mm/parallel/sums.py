"""What a model returns, added up over micro-batches and ranks."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def add_up(sums: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sum of each entry over micro-batches."""
    totals: dict[str, Tensor] = {}
    for one in sums:
        for key, value in one.items():
            totals[key] = totals[key] + value if key in totals else value
    return totals


def reduce_all(totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum of each entry over all ranks, in one collective.

    Args:
        totals: The same keys and shapes on every rank.

    Returns:
        Float64, so that large sums keep their last digits with gloo and with NCCL.
    """
    flat = torch.cat([value.double().reshape(-1) for value in totals.values()])
    dist.all_reduce(flat)
    parts = flat.split([value.numel() for value in totals.values()])
    return {
        key: part.reshape(value.shape)
        for (key, value), part in zip(totals.items(), parts, strict=True)
    }
