"""Devices, versions, backends, rates and problems of this machine, as a report."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from internlm_mm.doctor.attentions import examine_attentions
from internlm_mm.doctor.kernels import examine_kernels
from internlm_mm.doctor.problems import find_problems, gather_facts
from internlm_mm.utils.device import peak_flops, usable_cores
from internlm_mm.utils.rates import (
    MATMUL_SIZES,
    all_reduce_rate,
    copy_rate,
    float8_matmul_rate,
    host_copy_rates,
    matmul_rate,
)
from internlm_mm.utils.system import builds, cpu_name


def examine(device: torch.device, seconds: float) -> dict[str, Any]:
    """Everything. Collective where there is a process group.

    Args:
        device: This process's.
        seconds: How long each rate is measured; 0 measures none.

    Returns:
        JSON-ready: `devices`, `versions`, `settings`, `attention` (see `examine_attentions`) with
        `attention_dtype`, `kernels` (see `examine_kernels`), `rates` and `problems`.
    """
    facts = gather_facts()
    dtype = training_dtype(device)
    return {
        'devices': describe_devices(),
        'ranks': dist.get_world_size() if dist.is_initialized() else 1,
        'versions': builds() | dict(facts.packages),
        'settings': dict(facts.settings),
        'attention': examine_attentions(device, dtype, seconds / 4),
        'attention_dtype': str(dtype).removeprefix('torch.'),
        'kernels': examine_kernels(device, dtype),
        'rates': measure_rates(device, seconds) if seconds else {},
        'problems': [problem._asdict() for problem in find_problems(facts)],
    }


def training_dtype(device: torch.device) -> torch.dtype:
    """What models are trained in on such a device."""
    if device.type != 'cuda':
        return torch.float32
    has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if has_bfloat16 else torch.float16


def describe_devices() -> list[dict[str, Any]]:
    """The GPUs that torch sees, and the processor."""
    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                'type': 'cuda',
                'name': properties.name,
                'capability': f'sm_{properties.major}{properties.minor}',
                'memory_bytes': properties.total_memory,
                'peak_tflops': (peak_flops(torch.device('cuda', index)) or 0) / 1e12 or None,
            }
        )
    threads = torch.get_num_threads()
    return [
        *found,
        {'type': 'cpu', 'name': cpu_name(), 'cores': usable_cores(), 'threads': threads},
    ]


def measure_rates(device: torch.device, seconds: float) -> dict[str, float]:
    """Matrix products by precision, copies, and the sum over ranks where there are several.

    Collective where there is a process group.

    Returns:
        `matmul_DTYPE` in FLOP/s, the others in bytes per second.
    """
    rates = {}
    for dtype in dict.fromkeys((training_dtype(device), torch.float32)):
        name = f'matmul_{str(dtype).removeprefix("torch.")}'
        rates[name] = matmul_rate(device, dtype, seconds)
    if device.type == 'cuda' and torch.cuda.get_device_capability(device) >= (8, 9):
        rates['matmul_float8'] = float8_matmul_rate(device, seconds)
    rates['copy'] = copy_rate(device, seconds)
    if device.type == 'cuda':
        rates['host_to_device'], rates['device_to_host'] = host_copy_rates(device, seconds)
    if dist.is_initialized() and dist.get_world_size() > 1:
        rates['all_reduce'] = all_reduce_rate(device, seconds)
    return rates


def render_examination(report: Mapping[str, Any]) -> str:
    """The report as lines for a person."""
    lines = ['devices']
    for device in report['devices']:
        if device['type'] == 'cuda':
            peak = f', {device["peak_tflops"]:,.0f} TFLOP/s bf16' if device['peak_tflops'] else ''
            lines.append(
                f'  {device["name"]}, {device["capability"]}, '
                f'{device["memory_bytes"] / 2**30:.1f} GiB{peak}'
            )
        else:
            lines.append(
                f'  {device["name"]}, {device["cores"]} cores, torch uses {device["threads"]}'
            )
    lines += ['versions', *(f'  {k:<14}{v}' for k, v in report['versions'].items())]
    if report['settings']:
        lines += ['settings', *(f'  {k}={v}' for k, v in report['settings'].items())]
    lines.append(f'attention in {report["attention_dtype"]}')
    lines += _attention_lines(report['attention'])
    lines.append('kernels besides, none of which is needed')
    for name, reasons in report['kernels'].items():
        lines.append(f'  {name}: {"; ".join(reasons) or "can run"}')
    if report['rates']:
        lines += ['rates, of one device', *_rate_lines(report)]
    lines.append('problems')
    for problem in report['problems']:
        lines += [f'  {problem["what"]}', f'    -> {problem["cure"]}']
    if not report['problems']:
        lines.append('  none that is known')
    return '\n'.join(lines)


def _attention_lines(found: Mapping[str, Any]) -> Iterator[str]:
    for rows, choice in found['auto'].items():
        yield f'  auto, {rows} rows: {choice["choice"]} ({choice["why"]})'
    for name, results in found.items():
        if name == 'auto':
            continue
        for rows, result in results.items():
            text = result.get('why', 'works')
            if 'forward_tflops' in result:
                text += (
                    f', {result["forward_tflops"]:,.3g} TFLOP/s forward, '
                    f'{result["both_tflops"]:,.3g} with backward'
                )
            yield f'  {name}, {rows} rows: {text}'


def _rate_lines(report: Mapping[str, Any]) -> Iterator[str]:
    kind = report['devices'][0]['type']
    rows, inner, outer = MATMUL_SIZES[kind]
    notes = {
        'copy': 'read and written in its memory',
        'host_to_device': 'from page-locked memory',
        'device_to_host': 'to page-locked memory',
        'all_reduce': f'on the bus, {report["ranks"]} ranks',
    }
    for name, rate in report['rates'].items():
        if name.startswith('matmul'):
            note = f'[{rows}, {inner}] x [{inner}, {outer}]'
            note += '' if name == 'matmul_float8' else ' and both gradients'
            yield f'  {name.replace("_", " "):<16} {rate / 1e12:>10,.3f} TFLOP/s, {note}'
        else:
            yield f'  {name.replace("_", " "):<16} {rate / 1e9:>10,.2f} GB/s, {notes[name]}'
