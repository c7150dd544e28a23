"""When to save and what to keep."""

from pathlib import Path
from typing import Any

from mmengine.hooks import Hook

from internlm_mm.checkpoint.checkpointer import remove_checkpoint
from internlm_mm.checkpoint.step_folders import list_checkpoints, step_of, verify
from internlm_mm.registry import HOOKS
from internlm_mm.utils.publish import set_aside


@HOOKS.register_module()
class StepCheckpointHook(Hook):
    """Save `WORK_DIR/iter_N` every `interval` steps and at the end, however the end comes.

    An old checkpoint is deleted only when newer ones are whole on disk, so a failing save never
    costs one.

    Args:
        interval: Steps from one checkpoint to the next; None saves only at the end.
        keep_last: Checkpoints to keep; None keeps all.
        async_save: Whether training goes on while files are written.
        save_optimizer: Whether a run can be resumed from the checkpoints.

    Raises:
        ValueError: If a number is less than 1.
    """

    priority = 'VERY_LOW'  # after every hook that may still change the step's state

    def __init__(
        self,
        interval: int | None = None,
        keep_last: int | None = None,
        async_save: bool = True,
        save_optimizer: bool = True,
    ) -> None:
        for name, value in (('interval', interval), ('keep_last', keep_last)):
            if value is not None and value < 1:
                raise ValueError(f'StepCheckpointHook: {name}={value} must be at least 1, or None')
        self.interval, self.keep_last = interval, keep_last
        self.async_save, self.save_optimizer = async_save, save_optimizer
        self._saved: int | None = None

    def before_train(self, runner: Any) -> None:
        """Hand the choice of background writing to the checkpointer."""
        runner.run_state.checkpointer.async_save = self.async_save
        self._saved = runner.iter if runner.iter else None  # resumed from it
        self._set_aside_newer(runner)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Save on the interval."""
        if self.interval is not None and self.every_n_train_iters(runner, self.interval):
            self._save(runner)

    def after_train(self, runner: Any) -> None:
        """Save the last step, wait until it is on disk, and tidy up."""
        if runner.train_loop.state_dict()['iter'] != self._saved:
            self._save(runner)
        runner.run_state.checkpointer.finish()
        self._tidy(runner, 0)

    def on_error(self, runner: Any) -> None:
        """Give a save in flight some time to finish before the process goes down."""
        runner.run_state.checkpointer.finish(timeout=60)

    def _set_aside_newer(self, runner: Any) -> None:
        """Take checkpoints beyond the step that training begins at out of a later resume's way.

        They are damaged, or of a branch that was given up, or of another run in the same folder.
        """
        if runner.rank != 0:
            return
        for path in list_checkpoints(runner.work_dir):
            if step_of(path) > runner.iter:
                renamed = set_aside(path, '{}.abandoned')
                runner.logger.warning(
                    f'{path} is beyond iteration {runner.iter}, where training begins: '
                    f'renamed to {renamed.name}'
                )

    def _save(self, runner: Any) -> None:
        step = runner.train_loop.state_dict()['iter']
        runner.save_checkpoint(
            runner.work_dir, f'iter_{step}', save_optimizer=self.save_optimizer, by_epoch=False
        )
        self._saved = step
        runner.logger.info(f'checkpoint {Path(runner.work_dir) / f"iter_{step}"}')
        # The one now being written is not counted: it may yet fail.
        self._tidy(runner, 1 if self.async_save else 0)

    def _tidy(self, runner: Any, in_flight: int) -> None:
        if self.keep_last is None or runner.rank != 0:
            return
        whole = [
            path
            for path in list_checkpoints(runner.work_dir)
            if not (in_flight and path.name == f'iter_{self._saved}')
            and not verify(path, checksums=False)
        ]
        for path in whole[: max(len(whole) - self.keep_last, 0)]:
            remove_checkpoint(path)
