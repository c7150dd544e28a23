"""What a measurement says: one honest line, a record on disk."""

import datetime
import hashlib
import json
import resource
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config

from internlm_mm.engine.runner import LLMRunner
from internlm_mm.parallel.recompute import recomputed_layers
from internlm_mm.parallel.strategy import HybridParallelStrategy
from internlm_mm.utils.config import dump_config
from internlm_mm.utils.device import peak_flops
from internlm_mm.utils.folders import why_not_writable
from internlm_mm.utils.rates import float8_matmul_rate, matmul_rate
from internlm_mm.utils.system import builds, cpu_name, nvidia_smi, packages


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


def speed_report(
    runner: LLMRunner, seconds: Sequence[float], outputs: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """Everything that follows from the times of the framework's steps. Collective.

    Args:
        runner: That ran them.
        seconds: Of each step.
        outputs: `num_tokens`, `num_targets`, `data_time` and `skipped` of each.

    Returns:
        JSON-ready: `framework` (`StepTimes`) and `step_seconds`; `tokens_per_second`, over all
        devices; of one device `tgs` and `useful_tgs` (trained tokens); `data_share`,
        `skipped_steps`; `tflops_full` and `tflops_causal`, `hardware_tflops_full` and `..._causal`
        with recomputation, `trained_share` of the weights, on devices with a known peak `mfu_full`,
        `mfu_causal`, `hfu_full` and `hfu_causal`; `peak_memory_bytes`, the most of any rank;
        `float8`, the recipe, where products are in 8 bits; and what they ran on.
    """
    device = runner.strategy.device
    times = summarise(seconds)
    tokens = statistics.fmean(step['num_tokens'] for step in outputs)
    targets = statistics.fmean(step['num_targets'] for step in outputs)
    report: dict[str, Any] = {
        'framework': asdict(times),
        'step_seconds': list(seconds),
        'tokens_per_second': tokens / times.median,
        'tgs': tokens / times.median / runner.world_size,
        'useful_tgs': targets / times.median / runner.world_size,
        'data_share': sum(step['data_time'] for step in outputs) / sum(seconds),
        'skipped_steps': int(sum(step['skipped'] for step in outputs)),
        'devices': runner.world_size,
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu_name(),
        'device_type': device.type,
        'dtype': _name_of(runner.strategy.param_dtype),
        'reduce_dtype': _name_of(runner.strategy.reduce_dtype),
        'threads': torch.get_num_threads(),
        'torch': torch.__version__,
        'peak_memory_bytes': most_of_ranks(peak_memory(device)),
    }
    float8 = runner.strategy.techniques.float8
    if float8 is not None:
        report['float8'] = float8.recipe + (', emulated' if float8.emulate else '')
    if device.type == 'cuda':
        report['reserved_memory_bytes'] = most_of_ranks(torch.cuda.max_memory_reserved(device))
    if runner.flops_per_token is not None:
        report |= _arithmetic(runner, report['tgs'])
    return report


def _arithmetic(runner: LLMRunner, tgs: float) -> dict[str, float]:
    flops = runner.flops_per_token
    assert flops is not None
    chosen, held = zip(*map(recomputed_layers, runner.strategy.parts), strict=True)
    again, layers = runner.strategy.sum_over_ranks([sum(chosen), sum(held)])
    share = again / layers if layers else 0.0
    hardware = flops.with_recomputation(share)
    found = {'recomputed_share': share, 'trained_share': flops.trained_share}
    peak = peak_flops(runner.strategy.device)
    for name, model, done in zip(
        ('full', 'causal'), (flops.full, flops.causal), hardware, strict=True
    ):
        found[f'tflops_{name}'] = tgs * model / 1e12
        found[f'hardware_tflops_{name}'] = tgs * done / 1e12
        if peak is not None:
            found[f'mfu_{name}'] = tgs * model / peak
            found[f'hfu_{name}'] = tgs * done / peak
    return found


def rate_of_products(strategy: HybridParallelStrategy) -> tuple[float, str] | None:
    """FLOP/s of matrix products like those of a run's layers, measured, and their dtype.

    None where such products cannot be measured: of 8 bits and emulated, or not here.
    """
    float8 = strategy.techniques.float8
    if float8 is None:
        dtype = strategy.param_dtype
        return matmul_rate(strategy.device, dtype), _name_of(dtype)
    if float8.emulate:
        return None
    return float8_matmul_rate(strategy.device), 'float8'


def add_matmul_rate(report: dict[str, Any], rate: tuple[float, str] | None) -> None:
    """Compare the arithmetic with the rate of `rate_of_products`, if there is one."""
    if rate is None:
        return
    flops, report['matmul_dtype'] = rate
    report['matmul_tflops'] = flops / 1e12
    for name in ('full', 'causal'):
        if f'tflops_{name}' in report:
            report[f'of_matmul_{name}'] = report[f'tflops_{name}'] * 1e12 / flops


def add_breakdown(report: dict[str, Any], found: dict[str, Any]) -> None:
    """Add the parts of a step, and what they and the timed step differ by."""
    timed = report['framework']['median'] * 1e3
    rest = timed - sum(found['parts_ms'].values())
    report['breakdown'] = found | {'timed_step_ms': timed, 'remainder_ms': rest}


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: allocated on a GPU, resident of this process on a CPU."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def allocator_flushes(device: torch.device) -> int:
    """How often so far torch found no memory, gave its unused blocks back and asked again.

    Each time the host waits for the GPU, which then waits for the host.
    """
    if device.type != 'cuda':
        return 0
    return int(torch.cuda.memory_stats(device).get('num_alloc_retries', 0))


def most_of_ranks(value: int) -> int:
    """The largest of all ranks' values. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.int64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def honest_line(report: Mapping[str, Any]) -> str:
    """Speed, arithmetic, utilisation and memory on one line; what is not known is not in it."""
    parts = [f'{report["tgs"]:,.0f} tokens/s/device ({report["useful_tgs"]:,.0f} trained)']
    if 'tflops_full' in report:
        full, causal = report['tflops_full'], report['tflops_causal']
        digits = 1 if full >= 10 else 3
        parts.append(f'{full:,.{digits}f} TFLOP/s full, {causal:,.{digits}f} causal')
    for name, label in (('mfu', 'MFU'), ('hfu', 'HFU')):
        if f'{name}_full' in report:
            full, causal = report[f'{name}_full'], report[f'{name}_causal']
            parts.append(f'{label} {full:.1%} full, {causal:.1%} causal')
    parts.append(f'{report["peak_memory_bytes"] / 2**30:.2f} GiB')
    if 'of_matmul_full' in report:
        parts.append(
            f'{report["of_matmul_full"]:.1%} full, {report["of_matmul_causal"]:.1%} causal of the '
            f'{report["matmul_tflops"]:,.3g} TFLOP/s that {report["matmul_dtype"]} products '
            'reach here'
        )
    return ' | '.join(parts)


def render(report: Mapping[str, Any]) -> str:
    """The report as lines for a person."""
    ours = report['framework']
    dtype = report['dtype']
    if 'float8' in report:
        dtype += f' with products in fp8 ({report["float8"]})'
    lines = [
        f'{report["devices"]} x {report["device"]}, torch {report["torch"]}, {dtype}, '
        f'gradients summed in {report["reduce_dtype"]}, {report["threads"]} threads',
        f'step {ours["median"] * 1e3:,.1f} ms (median of {ours["steps"]}, '
        f'{ours["minimum"] * 1e3:,.1f} to {ours["maximum"] * 1e3:,.1f}, spread '
        f'{ours["spread"]:.1%}), {report["data_share"]:.1%} of it waiting for data',
        honest_line(report),
    ]
    if report.get('trained_share', 1.0) < 1:
        lines.append(
            f'{report["trained_share"]:.2%} of the weights are trained: FLOPs of the others are '
            'those of forward and of gradients of activations, 4 a weight and not 6'
        )
    if report['skipped_steps']:
        lines.append(
            f'{report["skipped_steps"]} steps were skipped for gradients that are not finite: '
            'they lack the update, and their times say little'
        )
    if report.get('allocator_flushes'):
        lines.append(
            f'memory is at its limit: torch gave its free blocks back to the GPU '
            f'{report["allocator_flushes"]} times while it was measured, and each time all waited; '
            f'it holds {report["reserved_memory_bytes"] / 2**30:.2f} GiB for '
            f'{report["peak_memory_bytes"] / 2**30:.2f} GiB of tensors'
        )
    if 'bare' in report:
        bare = report['bare']
        blocks = ', '.join(f'{ratio:.4f}' for ratio in report['ratios'])
        lines.append(f'bare loop {bare["median"] * 1e3:,.1f} ms (spread {bare["spread"]:.1%})')
        lines.append(f'framework / bare = {report["ratio_to_bare"]:.4f} (blocks: {blocks})')
        if report.get('beyond_bare'):
            lines.append(f'the framework alone has {"; ".join(report["beyond_bare"])}')
    return '\n'.join(lines)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


def config_hash(config: Config) -> str:
    """sha256 of the resolved config: two records with equal hashes ran the same."""
    return hashlib.sha256(dump_config(config)[1].encode()).hexdigest()


def check_records(folder: Path) -> None:
    """Refuse a folder in which nothing could be kept, before anything is measured.

    Nothing is left behind, and no folder is made: ranks of one job ask at once.

    Args:
        folder: Of records; what is missing of it will be made.

    Raises:
        PermissionError: With the system's reason.
        NotADirectoryError: If the folder, or one around it, is a file.
    """
    path = folder.absolute()
    existing = next(one for one in (path, *path.parents) if one.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f'--records {folder}: {existing} is no folder')
    reason = why_not_writable(existing)
    if reason is not None:
        raise PermissionError(
            f'--records {folder}: nothing can be written into {existing}: {reason}'
        )


def save_record(
    folder: Path, report: Mapping[str, Any], name: str, config_sha256: str | None = None
) -> Path:
    """Keep a report with all that says how it came about. Nothing there is overwritten.

    Args:
        folder: Made if it is missing.
        report: JSON-ready.
        name: Of the config, or of what was measured; begins the file's name.
        config_sha256: See `config_hash`; None for what has no config.

    Returns:
        The file: `NAME_DATE_TIME_HASH.json`, time in UTC.
    """
    now = datetime.datetime.now(datetime.UTC)
    content = {
        'date': now.isoformat(timespec='seconds'),
        'name': name,
        **({} if config_sha256 is None else {'config_sha256': config_sha256}),
        'versions': builds() | packages(),
        'gpus': nvidia_smi(),
        'cpu': cpu_name(),
        **report,
    }
    folder.mkdir(parents=True, exist_ok=True)
    stem = f'{name}_{now:%Y%m%d_%H%M%S}' + (f'_{config_sha256[:8]}' if config_sha256 else '')
    for number in count(1):
        path = folder / (f'{stem}.json' if number == 1 else f'{stem}_{number}.json')
        try:
            with open(path, 'x', encoding='utf-8') as file:
                json.dump(content, file, indent=1)
                file.write('\n')
        except FileExistsError:  # two that ended in the same second
            continue
        return path
    raise AssertionError('unreachable')
