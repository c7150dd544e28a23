"""Measure training steps on this machine, alone or against another loop in alternated blocks."""

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from internlm_mm.engine.runner import LLMRunner
from internlm_mm.structures import Batch
from internlm_mm.utils.device import peak_flops, synchronize


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Times of several steps, in seconds.

    Attributes:
        median: Of all steps.
        minimum: The fastest.
        maximum: The slowest.
        spread: Middle half of the steps (interquartile range) over the median.
        steps: How many.
    """

    median: float
    minimum: float
    maximum: float
    spread: float
    steps: int


def summarise(seconds: Sequence[float]) -> StepTimes:
    """Median, extremes and spread of step times.

    Raises:
        ValueError: If there are fewer than two.
    """
    if len(seconds) < 2:
        raise ValueError(f'need at least 2 steps to measure, got {len(seconds)}')
    low, middle, high = statistics.quantiles(seconds, n=4)
    return StepTimes(
        median=middle,
        minimum=min(seconds),
        maximum=max(seconds),
        spread=(high - low) / middle,
        steps=len(seconds),
    )


class FrameworkSteps:
    """Steps through the real Runner, hooks and data included.

    Args:
        runner: Built from the config; its run must be long enough for all steps.
    """

    def __init__(self, runner: LLMRunner) -> None:
        self.runner = runner
        runner.prepare_training()
        runner.call_hook('before_run')
        self._steps = runner.train_loop.begin()

    def step(self) -> None:
        """One iteration of the training loop."""
        self.runner.train_loop.run_next(self._steps)

    def close(self) -> None:
        """Let hooks end what they began."""
        self.runner.call_hook('after_train')
        self.runner.call_hook('after_run')

    def sample(self, count: int) -> list[list[Batch]]:
        """Batches of the first steps, for a loop that has no data pipeline."""
        loader = self.runner.train_loop.dataloader
        steps = iter(loader)
        return [next(steps) for _ in range(count)]


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
    """Time the framework, and `other` in turns with it.

    Machines drift; taking turns, step by step, and comparing block by block lets both meet the same
    weather.

    Args:
        framework: The steps to measure.
        other: One step of the loop to compare with, or None.
        warmup: Steps before measuring, of each.
        steps: Steps of each in a block.
        blocks: Blocks of each.

    Returns:
        A JSON-ready report: `framework` and `other` (StepTimes), `tokens_per_second`, `tgs`,
        `tflops_full`, `mfu_full`, `mfu_causal`, `peak_memory_bytes`, and against another loop
        `ratio_to_bare`, the median over blocks of framework / other, with `ratios` of all blocks.
    """
    runner = framework.runner
    device = runner.strategy.device
    time_steps(framework.step, warmup, device)
    if other is not None:
        time_steps(other, warmup, device)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
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
    return _report(runner, ours, theirs, ratios)


def _report(
    runner: LLMRunner, ours: list[float], theirs: list[float], ratios: list[float]
) -> dict[str, Any]:
    device = runner.strategy.device
    times = summarise(ours)
    loader = runner.train_loop.dataloader
    tokens = loader.batch_size(runner.iter) * loader.dataset.seq_len
    tgs = tokens / times.median / runner.world_size
    report: dict[str, Any] = {
        'framework': asdict(times),
        'tokens_per_second': tokens / times.median,
        'tgs': tgs,
        'devices': runner.world_size,
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu',
        'threads': torch.get_num_threads(),
        'torch': torch.__version__,
    }
    flops = runner.flops_per_token
    if flops is not None:
        report['tflops_full'] = tgs * flops.full / 1e12
        peak = peak_flops(device)
        if peak is not None:
            report['mfu_full'] = tgs * flops.full / peak
            report['mfu_causal'] = tgs * flops.causal / peak
    report['peak_memory_bytes'] = peak_memory(device)
    if theirs:
        report['bare'] = asdict(summarise(theirs))
        report['ratios'] = ratios
        report['ratio_to_bare'] = statistics.median(ratios)
    return report


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: allocated on a GPU, resident of this process on a CPU."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def render(report: dict[str, Any]) -> str:
    """The report as lines for a person."""
    ours = report['framework']
    lines = [
        f'{report["devices"]} x {report["device"]}, torch {report["torch"]}, '
        f'{report["threads"]} threads',
        f'step {ours["median"] * 1e3:.1f} ms (median of {ours["steps"]}, '
        f'{ours["minimum"] * 1e3:.1f} to '
        f'{ours["maximum"] * 1e3:.1f}, spread {ours["spread"]:.1%})',
        f'{report["tokens_per_second"]:,.0f} tokens/s, {report["tgs"]:,.0f} per device'
        + (f', {report["tflops_full"]:.2f} TFLOP/s per device' if 'tflops_full' in report else '')
        + (
            f', MFU {report["mfu_full"]:.1%} full, {report["mfu_causal"]:.1%} causal'
            if 'mfu_full' in report
            else ''
        ),
        f'peak memory {report["peak_memory_bytes"] / 2**30:.2f} GiB',
    ]
    if 'bare' in report:
        bare = report['bare']
        blocks = ', '.join(f'{ratio:.4f}' for ratio in report['ratios'])
        lines.append(f'bare loop {bare["median"] * 1e3:.1f} ms (spread {bare["spread"]:.1%})')
        lines.append(f'framework / bare = {report["ratio_to_bare"]:.4f} (blocks: {blocks})')
    return '\n'.join(lines)
