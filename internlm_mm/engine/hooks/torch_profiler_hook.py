"""Traces of a few steps by torch's profiler."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from torch.profiler import ProfilerActivity, profile, schedule

from internlm_mm.registry import HOOKS


@HOOKS.register_module()
class TorchProfilerHook(Hook):
    """Record `active` steps; one Chrome trace a rank, `WORK_DIR/TIMESTAMP/FOLDER/rankR.json`.

    Open it in https://ui.perfetto.dev. Steps count from the start of this process. Recorded steps
    are slower than others; the table of the costliest operators goes to the log of rank 0.

    Reads and writes nothing in `outputs`.

    Args:
        wait: Steps before anything is recorded.
        warmup: Steps that are recorded and thrown away, in which the profiler settles.
        active: Steps in the trace.
        folder: Where traces go, inside the folder of this start of the run.
        memory: Whether to record allocations.
        stacks: Whether to record Python's call stack of every operator.
        ranks: Which ranks record; None for all.

    Raises:
        ValueError: If a number is out of range.
    """

    priority = 'LOWEST'  # so that a step of the trace holds all of its hooks

    def __init__(
        self,
        wait: int = 5,
        warmup: int = 2,
        active: int = 3,
        folder: str = 'profile',
        memory: bool = False,
        stacks: bool = False,
        ranks: Sequence[int] | None = (0,),
    ) -> None:
        for name, value, least in (('wait', wait, 0), ('warmup', warmup, 0), ('active', active, 1)):
            if value < least:
                raise ValueError(f'TorchProfilerHook: {name}={value} must be at least {least}')
        self.wait, self.warmup, self.active = wait, warmup, active
        self.folder, self.memory, self.stacks, self.ranks = folder, memory, stacks, ranks
        self._profiler: profile | None = None

    def before_train(self, runner: Any) -> None:
        """Start, on the chosen ranks."""
        if self.ranks is not None and runner.rank not in self.ranks:
            return
        needed, left = self.wait + self.warmup + self.active, runner.max_iters - runner.iter
        if left < needed:
            raise ValueError(
                f'TorchProfilerHook: wait={self.wait} + warmup={self.warmup} + '
                f'active={self.active} are {needed} steps, but the run has only {left}'
            )
        activities = [ProfilerActivity.CPU]
        if runner.strategy.device.type == 'cuda':
            activities.append(ProfilerActivity.CUDA)
        path = Path(runner.log_dir) / self.folder / f'rank{runner.rank}.json'

        def write(profiler: profile) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
            key = 'self_cuda_time_total' if len(activities) > 1 else 'self_cpu_time_total'
            table = profiler.key_averages().table(sort_by=key, row_limit=15)
            runner.logger.info(f'profile of {self.active} steps in {path}\n{table}')

        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=self.wait, warmup=self.warmup, active=self.active, repeat=1),
            on_trace_ready=write,
            profile_memory=self.memory,
            with_stack=self.stacks,
        )
        self._profiler.start()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """One step on; writes and stops after the last."""
        if self._profiler is None:
            return
        if self._profiler.step_num + 1 == self.wait + self.warmup + self.active:
            if runner.strategy.device.type == 'cuda':
                torch.cuda.synchronize(runner.strategy.device)  # the last kernels belong to it
            self._profiler.step()
            self._stop()
        else:
            self._profiler.step()

    def after_train(self, runner: Any) -> None:
        """Stop if a signal has cut the run short."""
        self._stop()

    def on_error(self, runner: Any) -> None:
        """Stop when training fails."""
        self._stop()

    def _stop(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
