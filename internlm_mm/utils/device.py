"""The device a process trains on and what it can do at best."""

import os

import torch

from internlm_mm.utils.launch import ranks_here
from internlm_mm.utils.suggest import did_you_mean

PEAK_BF16_FLOPS = {
    # Dense bf16 tensor-core peak in FLOP/s, from the vendors' data sheets. Longest match first.
    'H200': 989e12,
    'H20': 148e12,
    'H100 PCIe': 756e12,
    'H100 NVL': 835e12,
    'H100': 989e12,
    'H800': 989e12,
    'B200': 2250e12,
    'A100': 312e12,
    'A800': 312e12,
    'L40S': 362e12,
    'L40': 181e12,
    'L4': 121e12,
    'RTX 4090': 165e12,
    'RTX 3090': 71e12,
}


def pick_device(local_rank: int = 0) -> torch.device:
    """This process's device: the GPU numbered `local_rank`, or the CPU where there is none.

    Raises:
        ValueError: If there are GPUs but fewer than processes on this machine.
    """
    if not torch.cuda.is_available():
        return torch.device('cpu')
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f'process {local_rank} of this machine has no GPU: {count} visible. '
            f'Start {count} a machine.'
        )
    return torch.device('cuda', local_rank)


def device_of(name: torch.device | str | None) -> torch.device:
    """A device by its name; the first GPU if there is one, else the CPU, for None.

    Raises:
        ValueError: If PyTorch knows no such device, or this machine has no such GPU.
    """
    if name is None:
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
    except RuntimeError:
        hint = did_you_mean(name, ('cpu', 'cuda', 'cuda:0'))
        raise ValueError(f'there is no device {str(name)!r}.{hint}') from None
    if device.type == 'cuda':
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            seen = f'only {count}' if count else "none; 'cpu' computes without one"
            raise ValueError(f'there is no device {str(name)!r}: of GPUs PyTorch sees {seen}')
    return device


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_cores() -> int:
    """CPU cores for this process: those it may run on, shared with the machine's other ranks.

    torch's own number of threads is no guide: torchrun sets it to one.
    """
    beside = ranks_here()
    if beside is None:
        beside = torch.cuda.device_count()
    return max(1, usable_cores() // max(1, beside))


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of `device` in FLOP/s, or None where it is not known (every CPU)."""
    if device.type != 'cuda':
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_BF16_FLOPS.items() if key in name), None)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it; at once on a CPU."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def release_cached(device: torch.device) -> None:
    """Give memory that the allocator holds and nobody uses back to a GPU; nothing on a CPU."""
    if device.type == 'cuda':
        torch.cuda.empty_cache()


def dtype_of(name: str, key: str = 'dtype') -> torch.dtype:
    """`'bfloat16'` -> `torch.bfloat16`. Configs hold dtypes as strings.

    Args:
        name: Name of the dtype.
        key: Where it stands in the config, for the message.

    Raises:
        ValueError: If no floating-point dtype has that name.
    """
    valid = ('float32', 'bfloat16', 'float16', 'float64')
    if name not in valid:
        raise ValueError(
            f'{key}={name!r} is not a floating-point dtype to train in.{did_you_mean(name, valid)}'
        )
    return getattr(torch, name)
