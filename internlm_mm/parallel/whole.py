"""A model that is spread over ranks, whole on each of them again."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from internlm_mm.parallel.adapters import adapted_layers


@torch.no_grad()
def copy_whole(
    source: nn.Module, target: nn.Module, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Fill a model with the weights of one that is sharded. Collective, except for one process.

    One parameter is gathered at a time. Stages of a pipeline hold a part of the names only. Frozen
    weights in 4 bits, which every rank holds whole, are not copied: both models have the same ones.

    Args:
        source: As the strategy has placed it.
        target: The same model, built anew on the meta device.
        device: Where the copy goes.
        dtype: Of its parameters, but for those in 4 bits.

    Returns:
        `target`, in evaluation mode.

    Raises:
        ValueError: If the two have other parameters.
    """
    pairs = zip(adapted_layers(source), adapted_layers(target), strict=False)
    rounded = [(theirs, ours) for theirs, ours in pairs if theirs.scales is not None]
    for _, ours in rounded:
        ours.weight = None  # for which no room is made
    target.to(dtype).to_empty(device=device)
    for theirs, ours in rounded:
        ours.weight, ours.scales = theirs.weight, theirs.scales
    shared = {id(theirs.weight) for theirs, _ in rounded}
    # An objective is of no use to who reads the copy, and may have parameters.
    own = {k: v for k, v in source.state_dict().items() if not k.startswith('objective.')}
    wanted = target.state_dict(keep_vars=True)
    odd = sorted(own.keys() ^ wanted.keys())
    if odd:
        raise ValueError(f'a whole copy of the model is not like it: {odd[0]} is in one of them')
    for name, place in wanted.items():
        if id(place) in shared:
            continue
        part = own[name]
        if isinstance(part, DTensor):
            on_device: DTensor = part.to(device)  # type: ignore[assignment]  # if offloaded
            part = on_device.full_tensor()
        place.copy_(part)
    return target.requires_grad_(False).eval()
