"""One step of a rank: its micro-batches, forward and backward, and what they add up to."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from internlm_mm.parallel.context import around_step, share_batch
from internlm_mm.parallel.data import begin_micro_batch
from internlm_mm.parallel.mesh import Layout, ParallelMesh
from internlm_mm.parallel.pipeline import Pipeline
from internlm_mm.parallel.place import Techniques
from internlm_mm.parallel.sums import add_up, reduce_all
from internlm_mm.structures import Batch


class Stepper:
    """Runs micro-batches through what a rank holds of a model.

    Args:
        model: This rank's part, placed.
        pipeline: What runs the part if it is of a pipeline's stages; None for a whole depth.
        layout: Of the job.
        rank: Of this process.
        mesh: Of the layout; None where nothing is sharded, cast or moved.
        techniques: What was done to the model.
        device: Where it computes.
    """

    def __init__(
        self,
        model: nn.Module,
        pipeline: Pipeline | None,
        layout: Layout,
        rank: int,
        mesh: ParallelMesh | None,
        techniques: Techniques,
        device: torch.device,
    ) -> None:
        self._model, self._pipeline = model, pipeline
        self._layout, self._rank = layout, rank
        self._context = mesh.context if mesh is not None else None
        self._techniques, self._device = techniques, device

    def forward_backward(
        self, batches: Sequence[Batch], divisor: int, optim_wrapper: Any
    ) -> dict[str, Tensor]:
        """See `HybridParallelStrategy.forward_backward`.

        Args:
            batches: This rank's micro-batches of the step.
            divisor: The step's trained tokens over all ranks and micro-batches.
            optim_wrapper: Scales losses and goes backward.
        """
        with self._around(batches):
            sums = self._accumulate(self._own_part(batches), divisor, optim_wrapper)
        return self._sum_over_ranks(sums, 'train')

    def _accumulate(
        self, batches: Sequence[Batch], divisor: int, optim_wrapper: Any
    ) -> list[dict[str, Tensor]]:
        def loss_of(loss: Tensor) -> Tensor:
            return optim_wrapper.scale_loss(loss / divisor)

        if self._pipeline is not None:
            return self._pipeline.forward_backward(batches, loss_of)
        sums = []
        for index, batch in enumerate(batches):
            begin_micro_batch(self._model, index == len(batches) - 1, self._techniques.reshard)
            found = self._model(batch)
            optim_wrapper.backward(loss_of(found['loss']))
            sums.append({key: value.detach() for key, value in found.items()})
        return sums

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """See `HybridParallelStrategy.evaluate`."""
        with self._around(batches):
            own = self._own_part(batches)
            sums = (
                [self._model(batch) for batch in own]
                if self._pipeline is None
                else self._pipeline.evaluate(own)
            )
        return self._sum_over_ranks(sums, f'evaluate {batches[0].num_domains}')

    def _around(self, batches: Sequence[Batch]) -> AbstractContextManager[None]:
        exchange, seq_len = self._techniques.context_attention, batches[0].input_ids.shape[1]
        return around_step(self._context, exchange, seq_len, self._device)

    def _own_part(self, batches: Sequence[Batch]) -> list[Batch]:
        """On the device; of rows that ranks share, this rank's tokens."""
        moved = [batch.to(self._device) for batch in batches]
        if self._context is None:
            return moved
        return [share_batch(batch, self._context) for batch in moved]

    def _sum_over_ranks(self, sums: Sequence[Mapping[str, Tensor]], kind: str) -> dict[str, Tensor]:
        """Add up micro-batches and ranks; tensor ranks have the same sums, one of them counts."""
        totals = add_up(sums)
        if self._layout.world_size == 1:
            return totals
        if self._pipeline is not None:
            totals = self._pipeline.share_shapes(totals, kind)
        if self._layout.coordinate(self._rank)['tensor'] > 0:
            totals = {key: torch.zeros_like(value) for key, value in totals.items()}
        return reduce_all(totals)
