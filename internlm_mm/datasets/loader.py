"""Rows -> the micro-batches of one step, read ahead by worker processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Protocol

import torch
from torch.utils.data import DataLoader

from internlm_mm.datasets.packing import Row, collate_rows, untrained_row
from internlm_mm.datasets.sampler import BatchSizeRampup, check_division, micro_batches
from internlm_mm.registry import DATALOADERS
from internlm_mm.structures import Batch
from internlm_mm.utils.suggest import did_you_mean


class RowDataset(Protocol):
    """What a loader asks of a dataset: row i for any i >= 0, always the same."""

    def __len__(self) -> int: ...  # rows an epoch

    def __getitem__(self, index: int) -> Row: ...


@DATALOADERS.register_module()
class TokenLoader:
    """Yields one step's micro-batches of this rank, for ever.

    A step that starts with `rows` consumed takes global rows `rows` to
    `rows + batch_size(iteration) - 1`, and each rank a contiguous share. So the position in the
    data is one number, the rows consumed over all ranks, which the training loop keeps and gives
    to `seek`. Nothing here depends on how many workers there are, and no random state of the
    process is touched.

    Args:
        dataset: Map-style; shuffles and repeats by itself.
        global_batch_size: Rows of one optimizer step, over all ranks.
        micro_batch_size: Rows of one forward and backward on one rank.
        data_rank: This rank among those that read different data.
        data_world_size: How many such ranks there are.
        rampup: `dict(start=, increment=, interval=)`: the batch begins with `start` rows and grows
            by `increment` rows every `interval` steps up to `global_batch_size`; None begins with
            all of them.
        num_workers: Processes that read ahead; 0 reads in this process.
        pin_memory: Put batches into page-locked memory, so that copies to a GPU overlap with work.

    Raises:
        ValueError: If a batch size on the way does not divide into micro-batches on every rank.
    """

    def __init__(
        self,
        dataset: RowDataset,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int = 0,
        data_world_size: int = 1,
        rampup: BatchSizeRampup | Mapping[str, int] | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        check_division(global_batch_size, micro_batch_size, data_world_size)
        _check_rank(data_rank, data_world_size)
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.data_rank = data_rank
        self.data_world_size = data_world_size
        self.rampup = _as_rampup(rampup)
        if self.rampup is not None:
            if self.rampup.start > global_batch_size:
                raise ValueError(
                    f'rampup.start={self.rampup.start} is more than '
                    f'global_batch_size={global_batch_size}'
                )
            for size in self.rampup.stages(global_batch_size):
                check_division(size, micro_batch_size, data_world_size, 'a batch size of rampup')
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self._iteration = 0
        self._rows = 0

    def __len__(self) -> int:
        """Full-size steps in an epoch, at least 1."""
        return max(1, len(self.dataset) // self.global_batch_size)

    def batch_size(self, iteration: int) -> int:
        """Rows of step `iteration` (counted from 0) over all ranks."""
        if self.rampup is None:
            return self.global_batch_size
        return self.rampup.batch_size(iteration, self.global_batch_size)

    def micro_batches(self, iteration: int) -> int:
        """Micro-batches of step `iteration` on each rank."""
        return self.batch_size(iteration) // (self.micro_batch_size * self.data_world_size)

    @property
    def micro_batch_counts(self) -> list[int]:
        """How many micro-batches steps have on each rank, every number of the run in order."""
        unit = self.micro_batch_size * self.data_world_size
        full = self.global_batch_size
        sizes = [full] if self.rampup is None else self.rampup.stages(full)
        return [size // unit for size in sizes]

    def seek(self, iteration: int, rows: int) -> None:
        """Let the next `iter()` start at a step.

        Args:
            iteration: The step it will yield first, counted from 0.
            rows: Rows consumed before it, over all ranks.
        """
        if iteration < 0 or rows < 0:
            raise ValueError(f'cannot seek to iteration={iteration}, rows={rows}')
        self._iteration, self._rows = iteration, rows

    def __iter__(self) -> Iterator[list[Batch]]:
        # Workers start here, not at the first step, so that they read while the model is prepared.
        indices = self._indices(self._iteration, self._rows)
        # A step asks for all its batches at once: those of a whole one are read ahead, and more.
        ahead = 1 + max(self.micro_batch_counts)
        reader = _read(self.dataset, indices, self.num_workers, self.pin_memory, ahead)
        return self._steps(reader, self._iteration)

    def _indices(self, first: int, rows: int) -> Iterator[range]:
        """Rows of each micro-batch of this rank, for ever."""
        for iteration in count(first):
            size = self.batch_size(iteration)
            yield from micro_batches(
                rows, size, self.micro_batch_size, self.data_rank, self.data_world_size
            )
            rows += size

    def _steps(self, reader: Iterator[Batch], first: int) -> Iterator[list[Batch]]:
        for iteration in count(first):
            yield [next(reader) for _ in range(self.micro_batches(iteration))]


@DATALOADERS.register_module()
class EvalLoader:
    """One pass over a dataset, every row once; each item is a `Batch` of this rank.

    Every rank yields the same number of batches of the same shape, filled up with rows that have no
    labels, so that collective operations inside the model match.

    Args:
        dataset: Map-style; should not shuffle.
        micro_batch_size: Rows of one batch.
        data_rank: This rank among those that read different data.
        data_world_size: How many such ranks there are.
        max_rows: Read no more rows than this, over all ranks, evenly spread over the dataset.
        num_workers: Processes that read ahead; 0 reads in this process.
        pin_memory: Put batches into page-locked memory.
    """

    def __init__(
        self,
        dataset: RowDataset,
        *,
        micro_batch_size: int,
        data_rank: int = 0,
        data_world_size: int = 1,
        max_rows: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if micro_batch_size < 1 or (max_rows is not None and max_rows < 1):
            raise ValueError(
                f'micro_batch_size={micro_batch_size} and max_rows={max_rows} must be at least 1'
            )
        _check_rank(data_rank, data_world_size)
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.data_rank = data_rank
        self.data_world_size = data_world_size
        self.num_rows = min(len(dataset), max_rows or len(dataset))
        self.num_workers = num_workers
        self.pin_memory = pin_memory

    def __len__(self) -> int:
        """Batches of this rank."""
        return -(-self.num_rows // (self.micro_batch_size * self.data_world_size))

    def __iter__(self) -> Iterator[Batch]:
        rows = _Padded(self.dataset, self.num_rows)
        return _read(rows, self.indices(), self.num_workers, self.pin_memory)

    def indices(self) -> Iterator[range]:
        """Which rows each batch of this rank has; those behind the last row have no labels."""
        size = self.micro_batch_size
        for step in range(len(self)):
            start = (step * self.data_world_size + self.data_rank) * size
            yield range(start, start + size)


class _Padded:
    """The first rows of a pass, and rows without labels behind them."""

    def __init__(self, dataset: RowDataset, num_rows: int) -> None:
        self.dataset = dataset
        self.num_rows = num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> Row:
        if index >= self.num_rows:
            return untrained_row(self.dataset[0])
        return self.dataset[index * len(self.dataset) // self.num_rows]


class _Indices:
    """Makes an iterator the batch sampler of a DataLoader."""

    def __init__(self, indices: Iterator[range]) -> None:
        self._indices = indices

    def __iter__(self) -> Iterator[range]:
        return self._indices


def _read(
    dataset: RowDataset,
    indices: Iterator[range],
    num_workers: int,
    pin_memory: bool,
    ahead: int = 1,
) -> Iterator[Batch]:
    """Batches in the order of `indices`; workers read at least `ahead` of them ahead."""
    loader: DataLoader = DataLoader(
        dataset,  # type: ignore[arg-type]  # any map-style dataset will do
        batch_sampler=_Indices(indices),  # type: ignore[arg-type]
        collate_fn=collate_rows,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=max(2, -(-ahead // num_workers)) if num_workers else None,
        worker_init_fn=_obey_parent_only,
        # Its own generator: a DataLoader draws a seed for its workers, by default from the global
        # one, and a resumed run would then draw other numbers than one that went through.
        generator=torch.Generator(),
    )
    return _watched(iter(loader))


def _watched(reader: Iterator[Batch]) -> Iterator[Batch]:
    try:
        yield from reader
    except (ConnectionError, EOFError) as error:  # PyTorch tells most deaths, but not mid-transfer
        raise RuntimeError('a worker process that reads data exited unexpectedly') from error


def _obey_parent_only(worker_id: int) -> None:  # noqa: ARG001  # what a DataLoader calls
    """Let a worker ignore Ctrl-C and SIGTERM, but for a SIGTERM of the process it reads for.

    Launchers and terminals signal all processes of a job, and that process still needs rows for its
    last step. To ignore SIGTERM altogether would leave it waiting for its workers when it exits.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_when_told, args=(os.getppid(),), daemon=True).start()


def _exit_when_told(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _check_rank(data_rank: int, data_world_size: int) -> None:
    if not 0 <= data_rank < data_world_size:
        raise ValueError(f'data_rank={data_rank} is not in range({data_world_size})')


def _as_rampup(rampup: BatchSizeRampup | Mapping[str, int] | None) -> BatchSizeRampup | None:
    if rampup is None or isinstance(rampup, BatchSizeRampup):
        return rampup
    keys = ('start', 'increment', 'interval')
    for key in rampup:
        if key not in keys:
            raise ValueError(f'unknown key rampup.{key}.{did_you_mean(key, keys)}')
    missing = [key for key in keys if key not in rampup]
    if missing:
        raise ValueError(f'rampup lacks {", ".join(missing)}: it needs {", ".join(keys)}')
    return BatchSizeRampup(**rampup)
