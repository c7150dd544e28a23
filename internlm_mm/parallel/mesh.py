"""Degrees of parallelism -> one named DeviceMesh."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from internlm_mm.utils.suggest import did_you_mean

AXES = ('data_replicate', 'data_shard')
"""Mesh axes, outermost first: neighbours along the last axis are neighbours in the machine."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How many ranks share each kind of work.

    Attributes:
        data_replicate: Copies of the sharded model.
        data_shard: Ranks over which parameters, gradients and optimizer state of one copy are
            spread.
    """

    data_replicate: int = 1
    data_shard: int = 1

    @property
    def data(self) -> int:
        """Ranks that hold different data."""
        return self.data_replicate * self.data_shard


def resolve_layout(parallel: Mapping[str, int] | None, world_size: int, local_size: int) -> Layout:
    """Fill in `-1` and check that the degrees multiply to the world size.

    Args:
        parallel: Degree of each axis; one may be -1, 'whatever is left'. By default parameters are
            sharded inside a machine and replicated across machines.
        world_size: Processes in the job.
        local_size: Processes on one machine.

    Raises:
        ValueError: If an axis is unknown or the degrees do not fit; proposes a layout that does.
    """
    degrees = dict(parallel or {})
    for axis, degree in degrees.items():
        if axis not in AXES:
            raise ValueError(
                f'strategy.parallel: axis {axis!r} is unknown.{did_you_mean(axis, AXES)}'
            )
        if not isinstance(degree, int) or degree == 0 or degree < -1:
            raise ValueError(f'strategy.parallel.{axis}={degree!r}: expected a positive int or -1')
    if not degrees:
        shard = local_size if world_size % local_size == 0 else world_size
        degrees = {'data_replicate': world_size // shard, 'data_shard': shard}
    for axis in AXES:
        degrees.setdefault(axis, 1)
    free = [axis for axis, degree in degrees.items() if degree == -1]
    if len(free) > 1:
        raise ValueError(f'strategy.parallel: only one axis may be -1, got {", ".join(free)}')
    fixed = 1
    for degree in degrees.values():
        fixed *= max(degree, 1)
    if free and world_size % fixed == 0:
        degrees[free[0]] = world_size // fixed
    elif free or fixed != world_size:
        raise ValueError(
            f'strategy.parallel={dict(parallel or {})} needs a multiple of {fixed} processes'
            f'{"" if free else " (exactly that many)"}, but there are {world_size}. '
            f'Nearest: parallel=dict(data_replicate=1, data_shard={world_size})'
        )
    return Layout(**degrees)


def build_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    """The mesh with all axes of `AXES`, also those of size 1. Collective."""
    return init_device_mesh(
        device_type, tuple(getattr(layout, axis) for axis in AXES), mesh_dim_names=AXES
    )
