"""Which rows a step, a rank and a micro-batch take: functions of the step and rows consumed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSizeRampup:
    """A batch that grows from `start` by `increment` every `interval` steps up to the full size.

    Args:
        start: Rows of the first step, over all ranks.
        increment: Rows added at a time.
        interval: Optimizer steps between two additions.

    Raises:
        ValueError: If one of them is less than 1.
    """

    start: int
    increment: int
    interval: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f'rampup.{name} must be at least 1, got {value}')

    def batch_size(self, iteration: int, full: int) -> int:
        """Rows of step `iteration` (counted from 0) over all ranks."""
        return min(full, self.start + self.increment * (iteration // self.interval))

    def stages(self, full: int) -> list[int]:
        """Every batch size on the way to `full`, in order."""
        return [*range(self.start, full, self.increment), full]


def check_division(
    global_batch_size: int,
    micro_batch_size: int,
    data_world_size: int,
    key: str = 'global_batch_size',
) -> None:
    """Refuse a step that does not cut into equal micro-batches on every rank.

    Raises:
        ValueError: With the numbers, and the nearest sizes that do divide.
    """
    unit = micro_batch_size * data_world_size
    if micro_batch_size < 1 or global_batch_size < 1 or data_world_size < 1:
        raise ValueError(
            f'{key}={global_batch_size}, micro_batch_size={micro_batch_size} and '
            f'data_world_size={data_world_size} must be at least 1'
        )
    if global_batch_size % unit:
        below = global_batch_size // unit * unit
        nearest = f'{below} or {below + unit}' if below else str(unit)
        raise ValueError(
            f'{key}={global_batch_size} rows do not divide into micro-batches of '
            f'micro_batch_size={micro_batch_size} on {data_world_size} data ranks; '
            f'take a multiple of {unit}, for example {nearest}'
        )


def micro_batches(
    first_row: int, batch_size: int, micro_batch_size: int, data_rank: int, data_world_size: int
) -> Iterator[range]:
    """The rows of each micro-batch of one rank in one step.

    A rank's share is contiguous, so a step's rows do not depend on how they are cut.

    Args:
        first_row: Rows consumed before the step, over all ranks.
        batch_size: Rows of the step, over all ranks.
        micro_batch_size: Rows of one micro-batch.
        data_rank: This rank among those that read different data.
        data_world_size: How many such ranks there are.
    """
    share = batch_size // data_world_size
    start = first_row + data_rank * share
    for offset in range(0, share, micro_batch_size):
        yield range(start + offset, start + offset + micro_batch_size)
