"""The true norm of a gradient that is spread over ranks."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


@torch.no_grad()
def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """L2 norm over all gradients as if one rank held them whole. Collective where any is sharded.

    Every gradient is measured where it lies; squares are summed over exactly the mesh axes along
    which it is sharded, so that a replicated one counts once.

    Args:
        gradients: Plain tensors and DTensors on any meshes, on one device. The order and the
            placements are the same on every rank.

    Returns:
        The norm, fp32 (fp64 if the gradients are), [].
    """
    groups: dict[tuple, list[Tensor]] = {}
    for gradient in gradients:
        if isinstance(gradient, DTensor):
            partial = [p for p in gradient.placements if p.is_partial()]
            if partial:
                raise ValueError(f'a gradient is not reduced yet: placements {gradient.placements}')
            mesh = gradient.device_mesh
            axes = tuple(
                axis for axis, placement in enumerate(gradient.placements) if placement.is_shard()
            )
            groups.setdefault((mesh, axes), []).append(gradient.to_local())
        else:
            groups.setdefault((None, ()), []).append(gradient)
    total = None
    for (mesh, axes), local in groups.items():
        square = _sum_of_squares(local)
        for axis in axes:
            dist.all_reduce(square, group=mesh.get_group(axis))
        total = square if total is None else total + square
    if total is None:
        raise ValueError('there is no gradient to take the norm of')
    return total.sqrt()


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    filled = [tensor for tensor in tensors if tensor.numel()]  # a shard may be empty
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    if not filled:
        return torch.zeros((), dtype=dtype, device=tensors[0].device)
    norms = torch.stack(torch._foreach_norm(filled, 2, dtype=dtype))
    return norms.square().sum()
