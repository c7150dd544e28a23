"""Tensors of which a rank may hold only a part."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor as it is."""
    return plain_tensor(tensor.to_local() if isinstance(tensor, DTensor) else tensor)


def plain_tensor(tensor: Tensor) -> Tensor:
    """What a weight that FSDP2 gathers in a form of its own is made from; others as they are.

    torchao wraps such masters, which then have no memory that can be pointed at.
    """
    is_wrapped = hasattr(tensor, 'fsdp_pre_all_gather')
    return getattr(tensor, '_tensor', tensor) if is_wrapped else tensor


class Part(NamedTuple):
    """A rank's part of a tensor.

    Attributes:
        offsets: Where it begins, a number for each dimension.
        sizes: Its shape.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """What of the whole tensor it is."""
        return tuple(
            slice(start, start + size) for start, size in zip(self.offsets, self.sizes, strict=True)
        )


def part_of(
    shape: tuple[int, ...],
    placements: tuple[Any, ...],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...],
) -> Part:
    """The part at a coordinate of a mesh.

    Args:
        shape: Of the whole tensor.
        placements: One for each axis of the mesh.
        mesh_shape: Degrees of the axes.
        coordinate: Where on each axis.

    Raises:
        ValueError: If a placement is of a kind that cannot be stored.
    """
    offsets, sizes = [0] * len(shape), list(shape)
    for axis in _order_of_cuts(placements):
        dim, degree = placements[axis].dim, mesh_shape[axis]
        each = -(-sizes[dim] // degree)  # as `torch.chunk` does; the last may get less, or nothing
        start = min(each * coordinate[axis], sizes[dim])
        offsets[dim] += start
        sizes[dim] = min(each, sizes[dim] - start)
    return Part(tuple(offsets), tuple(sizes))


def _order_of_cuts(placements: tuple[Any, ...]) -> list[int]:
    """Mesh axes in the order in which they cut; without those that do not."""
    plain: list[int] = []
    strided: list[int] = []
    for axis, placement in enumerate(placements):
        if placement.is_partial():
            raise ValueError(f'a tensor that is not reduced yet cannot be stored: {placements}')
        if hasattr(placement, 'split_factor'):  # cut after the axes to its right
            strided.insert(0, axis)
        elif not placement.is_replicate():
            plain.append(axis)
    return plain + strided


def zeros_cut_like(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros of a shape of their own, cut along the same dimensions over the same ranks.

    Args:
        tensor: A DTensor, or a plain tensor, which nothing is cut like.
        shape: Whole; as many dimensions as `tensor` has.
        dtype: Of the zeros.
    """
    local = local_tensor(tensor)
    if not isinstance(tensor, DTensor):
        return torch.zeros(shape, dtype=dtype, device=local.device)
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None  # whoever has a part is in the mesh
    part = part_of(shape, tuple(tensor.placements), tuple(mesh.shape), tuple(coordinate))
    strides = torch.empty(shape, device='meta').stride()
    found = DTensor.from_local(
        torch.zeros(part.sizes, dtype=dtype, device=local.device),
        mesh,
        tensor.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=strides,
    )
    # from_local moves to the mesh's device; parameters that are offloaded are not there.
    return found.to(local.device) if found.to_local().device != local.device else found
