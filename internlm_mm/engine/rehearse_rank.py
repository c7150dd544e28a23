"""One rank of a job, built where there is none: meta device, pretended process group."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config
from torch import nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from internlm_mm.engine.memory_budget import attends_by_mask
from internlm_mm.parallel.mesh import AXES, Layout, ParallelMesh
from internlm_mm.parallel.place import Techniques, place_model
from internlm_mm.registry import MODELS
from internlm_mm.utils.shards import local_tensor


def build_model(config: Config) -> nn.Module:
    """The whole model of a config, on the meta device."""
    with torch.device('meta'):
        return MODELS.build(config.model)


@contextmanager
def pretended_group(rank: int, world_size: int) -> Iterator[None]:
    """A process group of `world_size` ranks of which only this one is there; nothing is sent.

    Raises:
        ValueError: If the process is in a real group.
    """
    if dist.is_initialized():
        raise ValueError('a rehearsal is one process on its own: start it without a launcher')
    dist.init_process_group('fake', store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def build_rank(config: Config, layout: Layout, rank: int, techniques: Techniques) -> dict[str, Any]:
    """Place a rank's part as the strategy does, and look at it.

    Args:
        config: Checked.
        layout: Of the job.
        rank: Which one.
        techniques: What is done to the model; `recompute` no budget any more.

    Returns:
        'rank', 'coordinate', 'attention', 'has_mask', 'shapes' and 'parameters'.
    """
    techniques = replace(techniques, float8=None)  # which needs a GPU and cuts nothing otherwise
    with pretended_group(rank, layout.world_size):
        # Parameters are on the meta device; a mesh of CPUs asks no driver for anything.
        mesh = ParallelMesh(layout, 'cpu') if techniques.needs_mesh(layout.world_size) else None
        model = build_model(config)
        gpu = torch.device('cuda')
        placed = place_model(model, layout, rank, mesh, techniques, gpu, elsewhere=True)
        parameters = dict(placed.model.named_parameters())
        shapes = [_shape(name, parameter) for name, parameter in parameters.items()]
    return {
        'rank': rank,
        'coordinate': layout.coordinate(rank),
        'attention': placed.attention,
        'has_mask': attends_by_mask(placed.model),
        'shapes': shapes,
        'parameters': {
            'here': sum(numel(shape['local']) for shape in shapes),
            'of': sum(numel(shape['global']) for shape in shapes),
            'bytes': sum(numel(shape['local']) * shape['itemsize'] for shape in shapes),
        },
    }


def _shape(name: str, parameter: torch.Tensor) -> dict[str, Any]:
    local = local_tensor(parameter)
    cuts = []
    if isinstance(parameter, DTensor):
        axes = parameter.device_mesh.mesh_dim_names or ()
        for axis, placement in zip(axes, parameter.placements, strict=True):
            if placement.is_shard() or hasattr(placement, 'split_factor'):
                cuts.append(f'{axis}: dim {placement.dim}')  # type: ignore[attr-defined]
    return {
        'name': name,
        'global': list(parameter.shape),
        'local': list(local.shape),
        'cut': cuts,
        'dtype': str(local.dtype).removeprefix('torch.'),
        'itemsize': local.element_size(),
    }


def numel(shape: list[int]) -> int:
    """How many numbers a tensor of this shape has."""
    return torch.Size(shape).numel()


def groups_of(layout: Layout, rank: int, gpus_per_node: int) -> dict[str, dict[str, Any]]:
    """The ranks that this one forms each kind of group with.

    Parameters are sharded over `data_shard` and `context` together: that group is 'shard'.

    Args:
        layout: Of the job.
        rank: Which one.
        gpus_per_node: Of one machine.
    """
    place = layout.coordinate(rank)
    kinds: dict[str, tuple[str, ...]] = {axis: (axis,) for axis in AXES if axis != 'data_shard'}
    kinds['shard'] = ('data_shard', 'context')
    found = {}
    for kind, axes in kinds.items():
        members = [place]
        for axis in axes:
            members = [
                one | {axis: number} for one in members for number in range(getattr(layout, axis))
            ]
        ranks = [layout.rank(**one) for one in members]
        nodes = {one // gpus_per_node for one in ranks}
        found[kind] = {'ranks': ranks, 'inside_node': len(nodes) == 1}
    return found
