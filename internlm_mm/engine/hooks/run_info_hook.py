"""The bridge to MMEngine's message hub."""

from typing import Any

from mmengine.hooks import RuntimeInfoHook

from internlm_mm.registry import HOOKS


@HOOKS.register_module()
class RunInfoHook(RuntimeInfoHook):
    """Copy a step's outputs into the message hub, for MMEngine's stock hooks that look there.

    Only on the interval, since every copy of a tensor waits for the device, and just before the
    loggers, so that what other hooks added is included.

    Args:
        interval: Steps from one copy to the next; that of the logger.

    Raises:
        ValueError: If `interval` is less than 1.
    """

    priority = (
        55  # after NORMAL, where outputs are added; before BELOW_NORMAL, where they are logged
    )

    def __init__(self, interval: int = 10) -> None:
        if interval < 1:
            raise ValueError(f'RunInfoHook: interval={interval} must be at least 1')
        self.interval = interval

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Note the iteration."""
        runner.message_hub.update_info('iter', runner.iter)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Copy every number on the interval and at the end."""
        if self.every_n_train_iters(runner, self.interval) or self.is_last_train_iter(runner):
            for key, value in (outputs or {}).items():
                runner.message_hub.update_scalar(f'train/{key}', float(value))
