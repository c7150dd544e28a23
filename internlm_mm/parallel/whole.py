"""A model that is spread over ranks, whole on each of them again."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def copy_whole(
    source: nn.Module, target: nn.Module, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Fill a model with the weights of one that is sharded. Collective, except for one process.

    One parameter is gathered at a time. Stages of a pipeline hold a part of the names only.

    Args:
        source: As the strategy has placed it.
        target: The same model, built anew on the meta device.
        device: Where the copy goes.
        dtype: Of its parameters.

    Returns:
        `target`, in evaluation mode.

    Raises:
        ValueError: If the two have other parameters.
    """
    target.to(dtype).to_empty(device=device)
    # An objective is of no use to who reads the copy, and may have parameters.
    own = {k: v for k, v in source.state_dict().items() if not k.startswith('objective.')}
    wanted = target.state_dict()
    odd = sorted(own.keys() ^ wanted.keys())
    if odd:
        raise ValueError(f'a whole copy of the model is not like it: {odd[0]} is in one of them')
    for name, place in wanted.items():
        part = own[name]
        if isinstance(part, DTensor):
            on_device: DTensor = part.to(device)  # type: ignore[assignment]  # if offloaded
            part = on_device.full_tensor()
        place.copy_(part)
    return target.requires_grad_(False).eval()
