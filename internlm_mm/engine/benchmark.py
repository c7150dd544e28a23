"""Measure training steps on this machine, alone or against another loop in alternated blocks."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from torch.profiler import ProfilerActivity, profile, record_function

from internlm_mm.engine.benchmark_report import (
    allocator_flushes,
    most_of_ranks,
    speed_report,
    summarise,
)
from internlm_mm.engine.breakdown import DATA_WAIT, OPTIMIZER, STEP, break_down, read_trace
from internlm_mm.engine.runner import LLMRunner
from internlm_mm.structures import Batch
from internlm_mm.utils.device import synchronize


class _Observer(Hook):
    """Keeps of every step's outputs what a report needs.

    Attributes:
        outputs: `num_tokens`, `num_targets`, `data_time` and `skipped` of each step.
    """

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.outputs: list[dict[str, float]] = []

    def after_train_iter(
        self,
        runner: Any,  # noqa: ARG002  MMEngine's signature
        batch_idx: int,  # noqa: ARG002
        data_batch: Any = None,  # noqa: ARG002
        outputs: Any = None,
    ) -> None:
        """Keep them."""
        keys = ('num_tokens', 'num_targets', 'data_time', 'skipped')
        self.outputs.append({key: outputs.get(key, 0) for key in keys})


class FrameworkSteps:
    """Steps through the real Runner, hooks and data included.

    Args:
        runner: Built from the config; its run must be long enough for all steps.

    Attributes:
        outputs: What the steps since `forget` put out; see `_Observer`.
    """

    def __init__(self, runner: LLMRunner) -> None:
        self.runner = runner
        self._observer = _Observer()
        self.outputs = self._observer.outputs
        runner.register_hook(self._observer)
        runner.prepare_training()
        runner.call_hook('before_run')
        self._steps = runner.train_loop.begin()

    def step(self) -> None:
        """One iteration of the training loop."""
        self.runner.train_loop.run_next(self._steps)

    def forget(self) -> None:
        """Drop the outputs so far: measuring begins."""
        self.outputs.clear()

    def close(self) -> None:
        """Let hooks end what they began."""
        self.runner.call_hook('after_train')
        self.runner.call_hook('after_run')

    def sample(self, count: int) -> list[list[Batch]]:
        """Batches of the first steps, for a loop that has no data pipeline."""
        loader = self.runner.train_loop.dataloader
        steps = iter(loader)
        return [next(steps) for _ in range(count)]

    def profile(self, count: int) -> dict[str, Any]:
        """Where the time of `count` further steps goes on rank 0; the other ranks only step.

        One more step comes before them. Collective.

        Returns what `break_down` does, or nothing on the other ranks.

        Raises:
            ValueError: If `count` is less than 1.
        """
        if count < 1:
            raise ValueError(f'need at least 1 step to break down, got {count}')
        if self.runner.rank != 0:
            for _ in range(1 + count):
                self.step()
            return {}
        device, wrapper = self.runner.strategy.device, self.runner.optim_wrapper
        steps, update = self._steps, wrapper.update_params
        activities = [ProfilerActivity.CPU]
        if device.type == 'cuda':
            activities.append(ProfilerActivity.CUDA)

        def marked_update(*args: Any, **kwargs: Any) -> Any:
            with record_function(OPTIMIZER):
                return update(*args, **kwargs)

        self._steps, wrapper.update_params = _marked(steps), marked_update
        try:
            with profile(activities=activities) as profiler:
                self.step()  # in which the profiler settles
                synchronize(device)
                for _ in range(count):
                    with record_function(STEP):
                        self.step()
                        synchronize(device)
        finally:
            self._steps = steps
            del wrapper.update_params  # the class has its own
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / 'trace.json'
            profiler.export_chrome_trace(str(path))
            return break_down(read_trace(path))


def _marked(steps: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
    while True:
        with record_function(DATA_WAIT):
            batches = next(steps)
        yield batches


def time_steps(step: Callable[[], Any], count: int, device: torch.device) -> list[float]:
    """Seconds of each of `count` steps, waiting for the device after each."""
    seconds = []
    synchronize(device)
    for _ in range(count):
        start = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(
    framework: FrameworkSteps,
    other: Callable[[], Any] | None,
    warmup: int,
    steps: int,
    blocks: int,
) -> dict[str, Any]:
    """Time the framework, and `other` in turns with it. Collective.

    Machines drift; taking turns, step by step, and comparing block by block lets both meet the same
    weather.

    Args:
        framework: The steps to measure.
        other: One step of the loop to compare with, or None.
        warmup: Steps before measuring, of each.
        steps: Steps of each in a block.
        blocks: Blocks of each.

    Returns:
        What `speed_report` does, and against another loop `ratio_to_bare`, the median over blocks
        of framework / other, with `ratios` of all blocks.
    """
    device = framework.runner.strategy.device
    first_step = time_steps(framework.step, warmup, device)[:1]
    if other is not None:
        time_steps(other, warmup, device)
    framework.forget()
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    flushes = allocator_flushes(device)
    ours: list[float] = []
    theirs: list[float] = []
    ratios: list[float] = []
    for block in range(blocks):
        mine: list[float] = []
        bare: list[float] = []
        for number in range(steps):
            # In turns within the block, too, and each as often first: machines drift in seconds.
            turns = [(framework.step, mine)] + ([] if other is None else [(other, bare)])
            for step, seconds in turns if (block + number) % 2 == 0 else reversed(turns):
                seconds += time_steps(step, 1, device)
        if bare:
            ratios.append(statistics.median(mine) / statistics.median(bare))
        ours += mine
        theirs += bare
    report = speed_report(framework.runner, ours, framework.outputs)
    if device.type == 'cuda':
        report['allocator_flushes'] = most_of_ranks(allocator_flushes(device) - flushes)
    if first_step:
        report['first_step_seconds'] = first_step[0]
    if theirs:
        report['bare'] = asdict(summarise(theirs))
        report['bare_seconds'] = theirs
        report['ratios'] = ratios
        report['ratio_to_bare'] = statistics.median(ratios)
    return report
