"""Which part of which tensor a rank writes and reads, on any layout.

`torch.distributed.checkpoint` works this out for itself, but sees only one order in which mesh axes
cut a dimension. FSDP2 cuts what tensor parallelism has cut before, the other way round, and where
sizes do not divide the two give different parts.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from internlm_mm.utils.shards import Part, part_of


def local_part(name: str, tensor: Tensor) -> tuple[Part, Tensor] | None:
    """This rank's part and its data; None where it has none.

    Raises:
        ValueError: If the data is not of the shape that the layout says.
    """
    if not isinstance(tensor, DTensor):
        return Part((0,) * tensor.ndim, tuple(tensor.shape)), tensor.detach()
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    part = part_of(
        tuple(tensor.shape), tuple(tensor.placements), tuple(mesh.shape), tuple(coordinate)
    )
    data = tensor.to_local().detach()
    empty = not data.numel() and 0 in part.sizes  # of what shape then, nobody agrees on
    if tuple(data.shape) != part.sizes and not empty:
        raise ValueError(
            f'{name}: {list(tensor.shape)} with placements {list(tensor.placements)} on mesh '
            f'{list(mesh.shape)} gives this rank {list(part.sizes)}, but it holds '
            f'{list(data.shape)}; sizes that the mesh divides are always right'
        )
    # An empty part may begin where that of another rank does; only a whole that is empty has one.
    return (part, data) if data.numel() or not tensor.numel() else None


def _local_parts(state: Mapping[str, Tensor]) -> dict[str, tuple[Part, Tensor]]:
    parts = ((name, local_part(name, tensor)) for name, tensor in state.items())
    return {name: part for name, part in parts if part is not None}


class SavePlanner(DefaultSavePlanner):
    """Every rank offers its parts; of those that several ranks have, one rank writes each."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, dedup_save_to_lowest_rank=False)
        self._parts: dict[str, tuple[Part, Tensor]] = {}

    def create_local_plan(self) -> SavePlan:
        """What this rank holds."""
        self._parts = _local_parts(self.state_dict)
        items = []
        for name, (part, data) in self._parts.items():
            offsets, sizes = torch.Size(part.offsets), torch.Size(part.sizes)
            written = TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
                properties=TensorProperties(dtype=data.dtype),
                size=self.state_dict[name].shape,
            )
            index = MetadataIndex(name, offsets)
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=written))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The data of one part."""
        return self._parts[index.fqn][1]


class LoadPlanner(DefaultLoadPlanner):
    """Every rank reads what overlaps its parts."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)
        self._parts: dict[str, tuple[Part, Tensor]] = {}

    def create_local_plan(self) -> LoadPlan:
        """What this rank wants."""
        assert self.metadata is not None  # torch sets it
        self._parts = _local_parts(self.state_dict)
        items: list[ReadItem] = []
        for name, (part, _) in self._parts.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)  # nothing else is stored
            chunk = ChunkStorageMetadata(
                offsets=torch.Size(part.offsets), sizes=torch.Size(part.sizes)
            )
            items += create_read_items_for_chunk_list(name, stored, [chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Where the data of one part goes."""
        return self._parts[index.fqn][1]
