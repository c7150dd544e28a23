"""Sharded matrices brought together whole, each at one rank that computes with it, and back."""

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from internlm_mm.utils.shards import Part, part_of

Coordinate = tuple[int, ...]
"""Where a rank stands on each axis that cuts."""

Stock = dict[tuple[int, Coordinate], Tensor]
"""Flat parts that a rank holds, by number of the matrix and by whose part it is."""


class _Arriving(NamedTuple):
    """Parts that are on their way.

    Attributes:
        work: The exchange.
        sent: What must live until it is done.
        received: Where it arrives.
        keys: Which parts arrive there, in their order.
        sizes: Numbers in each.
    """

    work: dist.Work
    sent: Tensor
    received: Tensor
    keys: list[tuple[int, Coordinate]]
    sizes: list[int]

    def wait(self) -> Stock:
        self.work.wait()
        parts = self.received.split(self.sizes)
        return dict(zip(self.keys, parts, strict=True))


class MatrixDeal:
    """Which of the ranks that share matrices works on which of them.

    Matrix number n belongs to rank n mod k of the k ranks that hold parts of it. Every rank sends
    its part of each matrix to the owner and gets its part of the result back: two exchanges in
    which a rank sends no more than what it holds. Ranks along an axis that does not cut the
    matrices hold the same parts: each such copy works for itself, and nothing crosses that axis,
    which may be a slow one.

    Args:
        like: One of the matrices. All have its mesh and its placements, or none of either.
        dtype: Of what travels.
        device: Where it is.
    """

    def __init__(self, like: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.degrees: Coordinate = ()
        self.here: Coordinate = ()
        self._groups: list[dist.ProcessGroup] = []
        self._axes: list[int] = []
        self._like = like
        self._parts: dict[tuple[int, ...], dict[Coordinate, Part]] = {}
        if not isinstance(like, DTensor):
            return
        mesh, place = like.device_mesh, like.device_mesh.get_coordinate()
        assert place is not None  # whoever holds a part is in the mesh
        for axis, placement in enumerate(like.placements):
            # Not `is_shard()`: there are several kinds of cutting, and not all are `Shard`.
            if not placement.is_replicate() and mesh.size(axis) > 1:
                self._axes.append(axis)
                self._groups.append(mesh.get_group(axis))
        self.degrees = tuple(mesh.size(axis) for axis in self._axes)
        self.here = tuple(place[axis] for axis in self._axes)

    @property
    def ranks(self) -> int:
        """Over how many ranks matrices are dealt out."""
        return prod(self.degrees)

    def owner(self, number: int) -> Coordinate:
        """Who works on a matrix."""
        rest, found = number % self.ranks, []
        for degree in reversed(self.degrees):
            rest, place = divmod(rest, degree)
            found.append(place)
        return tuple(reversed(found))

    def parts(self, shape: tuple[int, ...]) -> dict[Coordinate, Part]:
        """Every rank's part of a matrix."""
        if shape not in self._parts:
            everyone = list(product(*map(range, self.degrees)))
            if not isinstance(self._like, DTensor):
                self._parts[shape] = {(): Part((0,) * len(shape), shape)}
            else:
                mesh, place = self._like.device_mesh, self._like.device_mesh.get_coordinate()
                assert place is not None
                found = {}
                for one in everyone:
                    there = list(place)
                    for axis, position in zip(self._axes, one, strict=True):
                        there[axis] = position
                    found[one] = part_of(
                        shape, tuple(self._like.placements), tuple(mesh.shape), tuple(there)
                    )
                self._parts[shape] = found
        return self._parts[shape]

    def gather(self, matrices: 'Sequence[Matrix]', local: Sequence[Tensor]) -> 'Gathering':
        """Begin to bring matrices together. Collective over the ranks that share them.

        Args:
            matrices: Which; the same ones in the same order on all ranks.
            local: This rank's part of each, of the deal's dtype and on its device.
        """
        stock: Stock = {
            (matrix.number, self.here): part.reshape(-1)
            for matrix, part in zip(matrices, local, strict=True)
        }
        arriving = None
        for axis in range(len(self.degrees)):
            if arriving is not None:
                stock = arriving.wait()
            send: list[list[Tensor]] = [[] for _ in range(self.degrees[axis])]
            for number, whose in self._stock(matrices, axis, self.here):
                send[self.owner(number)[axis]].append(stock[number, whose])
            receive = [
                [
                    key
                    for key in self._stock(matrices, axis, self._moved(axis, place))
                    if self.owner(key[0])[axis] == self.here[axis]
                ]
                for place in range(self.degrees[axis])
            ]
            arriving = self._swap(axis, matrices, send, receive)
        return Gathering(self, matrices, stock, arriving)

    def scatter(self, matrices: 'Sequence[Matrix]', results: dict[int, Tensor]) -> list[Tensor]:
        """Send everybody their parts of what the owners found. Collective like `gather`.

        Args:
            matrices: As for `gather`.
            results: By number, those that this rank owns; of the matrices' shapes.

        Returns:
            This rank's part of every result, in the order of `matrices`.
        """
        shapes = {matrix.number: matrix.shape for matrix in matrices}
        stock: Stock = {
            (number, whose): result[part.slices].reshape(-1)
            for number, result in results.items()
            for whose, part in self.parts(shapes[number]).items()
        }
        for axis in reversed(range(len(self.degrees))):
            send: list[list[Tensor]] = [[] for _ in range(self.degrees[axis])]
            for number, whose in self._stock(matrices, axis + 1, self.here):
                send[whose[axis]].append(stock[number, whose])
            receive: list[list[tuple[int, Coordinate]]] = [[] for _ in range(self.degrees[axis])]
            for number, whose in self._stock(matrices, axis, self.here):
                receive[self.owner(number)[axis]].append((number, whose))
            stock = self._swap(axis, matrices, send, receive).wait()
        return [
            stock[matrix.number, self.here].view(self.parts(matrix.shape)[self.here].sizes)
            for matrix in matrices
        ]

    def _stock(
        self, matrices: 'Sequence[Matrix]', stage: int, place: Coordinate
    ) -> list[tuple[int, Coordinate]]:
        """What the rank at `place` holds after gathering along the first `stage` axes."""
        kept = [range(degree) for degree in self.degrees[:stage]]
        own = [range(position, position + 1) for position in place[stage:]]
        whose = list(product(*kept, *own))
        return [
            (matrix.number, one)
            for matrix in matrices
            if self.owner(matrix.number)[:stage] == place[:stage]
            for one in whose
        ]

    def _moved(self, axis: int, place: int) -> Coordinate:
        return (*self.here[:axis], place, *self.here[axis + 1 :])

    def _swap(
        self,
        axis: int,
        matrices: 'Sequence[Matrix]',
        send: list[list[Tensor]],
        receive: list[list[tuple[int, Coordinate]]],
    ) -> _Arriving:
        """Exchange parts along one axis.

        Args:
            axis: Which of the axes that cut.
            matrices: What is exchanged.
            send: Parts for each rank of the axis.
            receive: Which parts come from each.
        """
        shapes = {matrix.number: matrix.shape for matrix in matrices}
        sizes = [[prod(self.parts(shapes[n])[one].sizes) for n, one in keys] for keys in receive]
        parts = [part for some in send for part in some]
        nothing = torch.empty(0, dtype=self.dtype, device=self.device)  # a rank may have none
        sent = torch.cat([nothing, *parts])
        received = nothing.new_empty(sum(map(sum, sizes)))
        work = dist.all_to_all_single(
            received,
            sent,
            list(map(sum, sizes)),
            [sum(part.numel() for part in some) for some in send],
            group=self._groups[axis],
            async_op=True,
        )
        keys = [key for keys in receive for key in keys]
        return _Arriving(work, sent, received, keys, [size for some in sizes for size in some])


class Matrix(NamedTuple):
    """One matrix of a deal.

    Attributes:
        number: Decides who owns it.
        shape: Whole.
    """

    number: int
    shape: tuple[int, ...]


class Gathering(NamedTuple):
    """Matrices that are being brought together.

    Attributes:
        deal: Whose `gather` began it.
        matrices: Which.
        stock: Parts that were here from the start, where nothing travels.
        arriving: Parts that travel.
    """

    deal: MatrixDeal
    matrices: Sequence[Matrix]
    stock: Stock
    arriving: _Arriving | None

    def wait(self) -> dict[int, Tensor]:
        """The matrices that this rank owns, whole, by number."""
        stock = self.stock if self.arriving is None else self.arriving.wait()
        found = {}
        for number, shape in self.matrices:
            if self.deal.owner(number) != self.deal.here:
                continue
            parts = self.deal.parts(shape)
            if len(parts) == 1:
                (one,) = parts
                found[number] = stock[number, one].view(shape)
                continue
            whole = stock[number, self.deal.here].new_empty(shape)
            for one, part in parts.items():
                whole[part.slices] = stock[number, one].view(part.sizes)
            found[number] = whole
        return found
