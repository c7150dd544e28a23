"""DTensors as FSDP2 lays them out, also over tensor parallelism, made by FSDP2 itself."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, distribute_tensor

AXES = ('data_replicate', 'shard', 'tensor')


def place(
    wholes: Mapping[str, Tensor],
    degrees: tuple[int, int, int],
    tensor_plan: Mapping[str, Placement],
) -> dict[str, Tensor]:
    """Spread tensors over all ranks.

    Args:
        wholes: The same on every rank.
        degrees: Of `AXES`.
        tensor_plan: How those are laid out that tensor parallelism knows of; it leaves the others
            alone.
    """
    mesh = init_device_mesh('cpu', degrees, mesh_dim_names=AXES)
    holder = nn.Module()
    for index, (name, whole) in enumerate(wholes.items()):
        value = whole.clone()
        if degrees[2] > 1 and name in tensor_plan:
            value = distribute_tensor(value, mesh['tensor'], [tensor_plan[name]])
        holder.register_parameter(f'p{index}', nn.Parameter(value))
    fully_shard(holder, mesh=mesh['data_replicate', 'shard'] if degrees[0] > 1 else mesh['shard'])
    return {
        name: parameter.detach()
        for name, parameter in zip(wholes, holder.parameters(), strict=True)
    }


def random_tensors(shapes: Mapping[str, tuple[int, ...]], dtype=torch.float32) -> dict[str, Tensor]:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(11)
    return {
        name: (10.0**index * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        for index, (name, shape) in enumerate(shapes.items())
    }
