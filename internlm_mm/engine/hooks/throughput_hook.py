"""Speed, counted honestly."""

from typing import Any

from mmengine.hooks import Hook

from internlm_mm.registry import HOOKS
from internlm_mm.utils.device import peak_flops
from internlm_mm.utils.flops import FlopsPerToken


@HOOKS.register_module()
class ThroughputHook(Hook):
    """Add speed to a step's outputs, every `interval` steps, averaged over them.

    The time is that of whole steps, waiting for data included; evaluation and checkpoints are not
    steps. The first step of a run pays for warm-up and is left out, as are steps whose data
    `skip_batches` passes over.

    Reads `num_tokens`, `time`, `data_time` and `passed_over`.
    Writes `tokens_per_second` (over all ranks), `tgs` (tokens / second / device), `data_share`
    (part of the time spent waiting for data), `eta` (seconds), and, for models whose sizes are
    known, `tflops` (per device, attention counted in full) and, on GPUs with a known peak,
    `mfu_full` and `mfu_causal` (shares of the bf16 peak; recomputation never counts).

    Args:
        interval: Steps from one reading to the next.

    Raises:
        ValueError: If `interval` is less than 1.
    """

    priority = 'ABOVE_NORMAL'  # before the hooks that print what is written here

    def __init__(self, interval: int = 10) -> None:
        if interval < 1:
            raise ValueError(f'ThroughputHook: interval={interval} must be at least 1')
        self.interval = interval
        self._flops: FlopsPerToken | None = None
        self._peak: float | None = None
        self._warm = False
        self._reset()

    def before_train(self, runner: Any) -> None:
        """Look up what a token costs and what the device can do."""
        self._flops = runner.flops_per_token
        self._peak = peak_flops(runner.strategy.device)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Add up; on the interval, write the reading."""
        trained = not outputs.get('passed_over')  # such a step takes no time and would flatter
        if self._warm and trained:
            self._steps += 1
            self._tokens += outputs['num_tokens']
            self._seconds += outputs['time']
            self._waiting += outputs['data_time']
        due = self.every_n_train_iters(runner, self.interval) or self.is_last_train_iter(runner)
        if due and self._seconds:
            outputs |= self._reading(runner.world_size)
            outputs['eta'] = self._seconds / self._steps * (runner.max_iters - runner.iter - 1)
            self._reset()
        self._warm = self._warm or trained

    def _reading(self, world_size: int) -> dict[str, float]:
        speed = self._tokens / self._seconds
        reading = {
            'tokens_per_second': speed,
            'tgs': speed / world_size,
            'data_share': self._waiting / self._seconds,
        }
        if self._flops is not None:
            reading['tflops'] = reading['tgs'] * self._flops.full / 1e12
            if self._peak is not None:
                reading['mfu_full'] = reading['tgs'] * self._flops.full / self._peak
                reading['mfu_causal'] = reading['tgs'] * self._flops.causal / self._peak
        return reading

    def _reset(self) -> None:
        self._tokens = self._steps = 0
        self._seconds = self._waiting = 0.0
