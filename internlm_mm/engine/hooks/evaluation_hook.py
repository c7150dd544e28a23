"""When to evaluate."""

from typing import Any

from mmengine.hooks import Hook

from internlm_mm.registry import HOOKS


@HOOKS.register_module()
class EvaluationHook(Hook):
    """Run the evaluation loop every `interval` steps, and at both ends if asked.

    Args:
        interval: Steps from one evaluation to the next; None for none in between.
        at_start: Whether to evaluate before the first step, untrained, as a baseline. A resumed run
            does not.
        at_end: Whether to evaluate after the last step.

    Writes `runner.message_hub` scalars through the loop's `after_val_epoch` hooks, and its own
    `history`: {step: metrics}.

    Raises:
        ValueError: If `interval` is less than 1.
    """

    priority = 'LOW'

    def __init__(
        self, interval: int | None = None, at_start: bool = False, at_end: bool = True
    ) -> None:
        if interval is not None and interval < 1:
            raise ValueError(f'EvaluationHook: interval={interval} must be at least 1, or None')
        self.interval, self.at_start, self.at_end = interval, at_start, at_end
        self.history: dict[int, dict[str, float]] = {}

    def before_train(self, runner: Any) -> None:
        """The baseline."""
        if runner.val_loop is None:
            raise ValueError('EvaluationHook needs val_dataloader and val_cfg in the config')
        if self.at_start and runner.iter == 0:
            self._evaluate(runner, 0)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """The interval."""
        stopped = runner.train_loop.stopped_by_signal  # little time is left: it is for saving
        due = self.interval is not None and self.every_n_train_iters(runner, self.interval)
        if due and not stopped:
            self._evaluate(runner, runner.iter + 1)

    def after_train(self, runner: Any) -> None:
        """The end, unless a signal cut the run short or the interval has just evaluated it."""
        stopped = runner.train_loop.stopped_by_signal
        if self.at_end and not stopped and runner.iter not in self.history:
            self._evaluate(runner, runner.iter)

    def _evaluate(self, runner: Any, step: int) -> None:
        self.history[step] = runner.val_loop.run()
