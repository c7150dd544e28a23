"""Garbage collection at the same step on every rank."""

import gc
from typing import Any

from mmengine.hooks import Hook

from internlm_mm.registry import HOOKS


@HOOKS.register_module()
class GarbageCollectionHook(Hook):
    """Collect Python's cyclic garbage every `interval` steps, and not in between.

    Left to itself, each rank's collector pauses it at a moment of its own, and all others wait for
    it in the next collective. What exists when training begins is frozen: it is not searched again.
    A program that has frozen objects itself keeps what it froze.

    Reads and writes nothing in `outputs`.

    Args:
        interval: Steps from one collection to the next.

    Raises:
        ValueError: If `interval` is less than 1.
    """

    priority = 'LOWEST'

    def __init__(self, interval: int = 100) -> None:
        if interval < 1:
            raise ValueError(f'GarbageCollectionHook: interval={interval} must be at least 1')
        self.interval = interval
        self._was_enabled = False
        self._froze = False

    def before_train(self, runner: Any) -> None:
        """Take over from the automatic collector."""
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()
        if gc.get_freeze_count() == 0:
            gc.freeze()
            self._froze = True

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Collect on the interval."""
        if self.every_n_train_iters(runner, self.interval):
            gc.collect()

    def after_train(self, runner: Any) -> None:
        """Give collection back to Python."""
        self._restore()

    def on_error(self, runner: Any) -> None:
        """Give collection back to Python when training fails."""
        self._restore()

    def _restore(self) -> None:
        if self._froze:
            gc.unfreeze()
            self._froze = False
        if self._was_enabled:
            gc.enable()
