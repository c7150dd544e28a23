"""A pipeline schedule and a strategy that label their work in a profiler's trace."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed.pipelining.schedules import Schedule1F1B
from torch.profiler import record_function

from internlm_mm.parallel import HybridParallelStrategy
from internlm_mm.registry import SCHEDULES, STRATEGIES
from internlm_mm.structures import Batch


@SCHEDULES.register_module(name='labelled_1f1b')
class Labelled1F1B(Schedule1F1B):
    """1F1B whose steps show as `pipeline step`."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Run one step under its label."""
        with record_function('pipeline step'):
            return super().step(*args, **kwargs)


@STRATEGIES.register_module()
class LabelledStrategy(HybridParallelStrategy):
    """The strategy, with a step's forward and backward under one label."""

    def forward_backward(self, batches: Sequence[Batch], divisor: int) -> dict[str, Tensor]:
        """Accumulate a step's gradient under its label."""
        with record_function(f'{len(batches)} micro-batches'):
            return super().forward_backward(batches, divisor)
