"""Degrees of parallelism -> a layout -> named DeviceMeshes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from internlm_mm.utils.suggest import did_you_mean

AXES = ('pipeline', 'data_replicate', 'data_shard', 'context', 'tensor')
"""Mesh axes, outermost first: neighbours along the last axis are neighbours in the machine."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How many ranks share each kind of work.

    Attributes:
        pipeline: Groups of ranks that hold different layers.
        data_replicate: Copies of the sharded model.
        data_shard: Ranks over which parameters, gradients and optimizer state of one copy are
            spread.
        context: Ranks that share the tokens of a sequence. Parameters are spread over them, too.
        tensor: Ranks that share every matrix.
    """

    pipeline: int = 1
    data_replicate: int = 1
    data_shard: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def data(self) -> int:
        """Ranks, or groups of ranks, that hold different rows."""
        return self.data_replicate * self.data_shard

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return prod(asdict(self).values())

    def coordinate(self, rank: int) -> dict[str, int]:
        """Where a rank stands on each axis."""
        place = {}
        for axis in reversed(AXES):
            rank, place[axis] = divmod(rank, getattr(self, axis))
        return {axis: place[axis] for axis in AXES}

    def rank(self, **coordinate: int) -> int:
        """The rank at a coordinate; axes that are left out are 0."""
        found = 0
        for axis in AXES:
            found = found * getattr(self, axis) + coordinate.get(axis, 0)
        return found

    def data_rank(self, rank: int) -> int:
        """Which share of the rows a rank reads."""
        place = self.coordinate(rank)
        return place['data_replicate'] * self.data_shard + place['data_shard']

    def as_dict(self) -> dict[str, int]:
        """Degree of each axis, as a config has it."""
        return asdict(self)

    def __str__(self) -> str:
        degrees = ', '.join(f'{axis}={n}' for axis, n in asdict(self).items() if n > 1)
        return f'dict({degrees or "data_shard=1"})'


class LayoutError(ValueError):
    """Degrees that do not multiply to the number of processes.

    Args:
        reason: What does not fit, a sentence.
        degrees: Of each axis that was named.
        world_size: Processes in the job.
        local_size: Processes on one machine.
    """

    def __init__(
        self, reason: str, degrees: Mapping[str, int], world_size: int, local_size: int
    ) -> None:
        nearest = nearest_layout(degrees, world_size, local_size)
        super().__init__(f'{reason} Nearest: parallel={nearest}')
        self.reason, self.degrees = reason, dict(degrees)
        self.world_size, self.local_size = world_size, local_size


def resolve_layout(parallel: Mapping[str, int] | None, world_size: int, local_size: int) -> Layout:
    """Fill in `-1` and check that the degrees multiply to the world size.

    Args:
        parallel: Degree of each axis; one may be -1, 'whatever is left'. Where no data axis is
            named, parameters are sharded inside a machine and replicated across machines.
        world_size: Processes in the job.
        local_size: Processes on one machine.

    Raises:
        ValueError: If an axis is unknown or a degree is none.
        LayoutError: If the degrees do not fit; proposes some that do.
    """
    degrees = dict(parallel or {})
    for axis, degree in degrees.items():
        if axis not in AXES:
            raise ValueError(
                f'strategy.parallel: axis {axis!r} is unknown.{did_you_mean(axis, AXES)}'
            )
        if not isinstance(degree, int) or degree == 0 or degree < -1:
            raise ValueError(f'strategy.parallel.{axis}={degree!r}: expected a positive int or -1')
    free = [axis for axis, degree in degrees.items() if degree == -1]
    if len(free) > 1:
        raise ValueError(f'strategy.parallel: only one axis may be -1, got {", ".join(free)}')
    fixed = prod(degree for degree in degrees.values() if degree > 0)
    if not free and not {'data_replicate', 'data_shard'} & set(degrees):
        if world_size % fixed == 0:
            inner = degrees.get('context', 1) * degrees.get('tensor', 1)
            degrees['data_shard'] = _shard_inside_machine(world_size // fixed, local_size, inner)
            degrees['data_replicate'] = world_size // fixed // degrees['data_shard']
            fixed = world_size
    elif free and world_size % fixed == 0:
        degrees[free[0]] = world_size // fixed
        fixed = world_size
    if fixed != world_size:
        # Data axes take up a multiple, unless a number is given for one and -1 for none.
        exactly = not free and {'data_replicate', 'data_shard'} & set(degrees)
        raise LayoutError(
            f'strategy.parallel={dict(parallel or {})} needs '
            f'{"exactly" if exactly else "a multiple of"} {fixed} processes, '
            f'but there are {world_size}.',
            degrees,
            world_size,
            local_size,
        )
    return Layout(**degrees)


def nearest_layout(parallel: Mapping[str, int], world_size: int, local_size: int) -> Layout:
    """A layout of `world_size` ranks with degrees as wanted, or the next smaller that divide it.

    The model's axes come first, tensor before context before pipeline; data axes take the rest.
    """
    rest = world_size
    degrees = {}
    for axis in ('tensor', 'context', 'pipeline'):
        degrees[axis] = largest_divisor(rest, parallel.get(axis, 1))
        rest //= degrees[axis]
    inner = degrees['tensor'] * degrees['context']
    wanted = parallel.get('data_shard', -1)
    shard = (
        largest_divisor(rest, wanted)
        if wanted > 0
        else _shard_inside_machine(rest, local_size, inner)
    )
    return Layout(**degrees, data_shard=shard, data_replicate=rest // shard)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is not above `limit`; at least 1."""
    return next((d for d in range(min(number, max(limit, 1)), 1, -1) if number % d == 0), 1)


def _shard_inside_machine(data: int, local_size: int, inner: int) -> int:
    """Ranks to shard over so that a group does not leave its machine; all if that cannot be."""
    inside = local_size // inner
    return inside if inside > 0 and data % inside == 0 else data


class ParallelMesh:
    """The DeviceMeshes of a layout. Collective to make.

    Parameters are sharded over `data_shard` and `context` together, which is one axis of the mesh,
    `shard`; FSDP2 and tensor parallelism need to share one mesh. The axes that only some
    techniques use have meshes of their own.

    Args:
        layout: Its world size is that of the process group.
        device_type: 'cuda' or 'cpu'.

    Attributes:
        fsdp: Axes (shard,) or (data_replicate, shard).
        tensor: One axis, or None where it has one rank.
        context: Likewise.
        pipeline: Likewise.
    """

    def __init__(self, layout: Layout, device_type: str) -> None:
        degrees = layout.as_dict()
        degrees['shard'] = layout.data_shard * layout.context
        names = ('pipeline', 'data_replicate', 'shard', 'tensor')
        root = init_device_mesh(
            device_type, tuple(degrees[name] for name in names), mesh_dim_names=names
        )
        self.fsdp: DeviceMesh = (
            root['data_replicate', 'shard'] if layout.data_replicate > 1 else root['shard']
        )
        self.tensor: DeviceMesh | None = root['tensor'] if layout.tensor > 1 else None
        self.pipeline: DeviceMesh | None = root['pipeline'] if layout.pipeline > 1 else None
        self.context: DeviceMesh | None = None
        if layout.context > 1:
            every_axis = init_device_mesh(
                device_type, tuple(degrees[axis] for axis in AXES), mesh_dim_names=AXES
            )
            self.context = every_axis['context']
