"""Whether a layout fits a model, its sequences and its batch; asked before anything is built."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

from torch import nn
from torch.distributed.pipelining import schedules

from internlm_mm.parallel.mesh import Layout, LayoutError, nearest_layout
from internlm_mm.parallel.pipeline_plan import layer_names, plan_pipeline, read_options
from internlm_mm.registry import SCHEDULES

_SPLIT_BY_TENSOR = ('num_heads', 'num_kv_heads', 'intermediate_size', 'vocab_size')
_IN_ROUNDS = (schedules.ScheduleInterleaved1F1B, schedules.ScheduleInterleavedZeroBubble)


def check_layout(
    layout: Layout,
    model: nn.Module,
    seq_len: int,
    micro_batches: int | None = None,
    pipeline: Mapping[str, Any] | None = None,
    local_size: int | None = None,
    key: str = 'train_dataloader',
) -> None:
    """Compare a layout with what it is to spread.

    Args:
        layout: Of the job.
        model: Whole, on the meta device or not; sizes that it does not tell are not compared.
        seq_len: Tokens of a row.
        micro_batches: Micro-batches of a step on each data rank, the fewest that occur; None where
            nothing is trained.
        pipeline: `strategy.pipeline`.
        local_size: Processes on one machine, for the proposal.
        key: Where the rows come from, for the message.

    Raises:
        ValueError: Naming both numbers and the nearest layout that fits.
    """
    total = None if micro_batches is None else micro_batches * layout.data
    job = _Job(model, seq_len, total, pipeline, key)
    what = job.misfit(layout)
    if what:
        nearest = job.nearest(layout.as_dict(), layout.world_size, local_size or layout.world_size)
        raise ValueError(f'{what} {nearest}')


def fitting_message(
    error: LayoutError,
    model: nn.Module,
    seq_len: int,
    micro_batches: int | None = None,
    pipeline: Mapping[str, Any] | None = None,
) -> str:
    """What `error` says, with the nearest layout that the model, its rows and its batch allow.

    Args:
        error: Knows nothing but the number of processes.
        model: As in `check_layout`.
        seq_len: Tokens of a row; 0 if they are not known.
        micro_batches: Of a step over all data ranks, or None.
        pipeline: `strategy.pipeline`.
    """
    job = _Job(model, seq_len, micro_batches, pipeline, 'train_dataloader')
    data = {key: error.degrees[key] for key in ('data_shard',) if error.degrees.get(key, 0) > 0}
    return f'{error.reason} {job.nearest(error.degrees, error.world_size, error.local_size, data)}'


@dataclass(frozen=True, slots=True)
class _Job:
    """What a layout is to spread.

    Attributes:
        model: Whole.
        seq_len: Tokens of a row.
        micro_batches: Of a step over all data ranks, or None.
        pipeline: `strategy.pipeline`.
        key: Where the rows come from.
        any_batch: Whether the batch may change a little so that data ranks share it evenly.
    """

    model: nn.Module
    seq_len: int
    micro_batches: int | None
    pipeline: Mapping[str, Any] | None
    key: str
    any_batch: bool = False

    def misfit(self, layout: Layout) -> str:
        """The first reason why a layout does not fit, a sentence; '' if it does."""
        context, tensor = layout.context, layout.tensor
        if context > 1 and self.seq_len % (2 * context):
            return (
                f'strategy.parallel.context={context} needs rows of a multiple of {2 * context} '
                f'tokens (two chunks a rank), not {self.key}.dataset.seq_len={self.seq_len}.'
            )
        for name in _SPLIT_BY_TENSOR if tensor > 1 else ():
            size = getattr(self.model, name, None)
            if size is not None and size % tensor:
                return f'strategy.parallel.tensor={tensor} does not divide model.{name}={size}.'
        if self.seq_len // context % tensor:
            return (
                f'strategy.parallel.tensor={tensor} does not divide the {self.seq_len // context} '
                f'tokens of a row of {self.key} that tensor ranks share.'
            )
        uneven = self.micro_batches is not None and self.micro_batches % layout.data
        if uneven and not self.any_batch:
            return f'{layout.data} data ranks do not share {self.micro_batches} micro-batches.'
        return self._pipeline_misfit(layout) if layout.pipeline > 1 else ''

    def _pipeline_misfit(self, layout: Layout) -> str:
        if getattr(self.model, 'tie_word_embeddings', False):
            return (
                f'strategy.parallel.pipeline={layout.pipeline}: model.tie_word_embeddings=True has '
                'one table at both ends of the model, which a pipeline cuts apart.'
            )
        ranks, names = layout.pipeline, layer_names(self.model)
        schedule, per_rank, _ = read_options(self.pipeline)
        if len(names) < ranks * per_rank:
            return (
                f'strategy.parallel.pipeline={ranks}: {ranks * per_rank} stages ({per_rank} a '
                f'rank) need as many layers, the model has {len(names)}.'
            )
        plan_pipeline(names, ranks, self.pipeline)
        if self.micro_batches is None:
            return ''
        count = self.micro_batches // layout.data
        plural = '' if count == 1 else 'es'
        if count < ranks:
            return (
                f'strategy.parallel.pipeline={ranks}: a step has {count} micro-batch{plural} on '
                'each data rank, fewer than the pipeline has ranks. Lower '
                'train_cfg.micro_batch_size or raise train_cfg.global_batch_size.'
            )
        rounds = count // ranks
        if issubclass(SCHEDULES.get(schedule), _IN_ROUNDS) and count % rounds:
            return (
                f'strategy.pipeline.schedule={schedule!r}: {count} micro-batches on each data rank '
                f'do not make whole rounds over {ranks} ranks, {rounds * ranks} would.'
            )
        return ''

    def nearest(
        self,
        wanted: Mapping[str, int],
        world_size: int,
        local_size: int,
        data: Mapping[str, int] | None = None,
    ) -> str:
        """Proposes the layout that fits with the fewest axes made smaller, by as little as can be.

        Data axes are free to take what the others leave, but for what `data` asks of them.
        """
        axes = ('tensor', 'context', 'pipeline')
        asked = [max(wanted.get(axis, 1), 1) for axis in axes]
        found = []
        for degrees in product(*(range(1, degree + 1) for degree in asked)):
            if world_size % prod(degrees):
                continue
            parallel = dict(zip(axes, degrees, strict=True)) | dict(data or {})
            candidate = nearest_layout(parallel, world_size, local_size)
            if self._fits(candidate):
                kept = sum(one == two for one, two in zip(degrees, asked, strict=True))
                found.append((kept, prod(degrees), degrees, candidate))
        if not found and self.micro_batches is not None and not self.any_batch:
            batch = ' with whole micro-batches (train_cfg) for each of its data ranks'
            free = replace(self, any_batch=True)
            return free.nearest(wanted, world_size, local_size, data) + batch
        if not found:
            return f'No layout of {world_size} processes fits.'
        return f'Nearest: parallel={max(found, key=lambda one: one[:3])[-1]}'

    def _fits(self, layout: Layout) -> bool:
        try:
            return not self.misfit(layout)
        except ValueError:  # options that are right for other degrees
            return False
