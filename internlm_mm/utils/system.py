"""What this machine and this installation are: for reports that must say what they were made on."""

import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    'internlm_mm',
    'mmengine-lite',
    'mmengine',
    'transformers',
    'sentencepiece',
    'safetensors',
    'numpy',
    'triton',
    'flash-attn-4',
    'flash-attn',
    'liger-kernel',
    'torchao',
    'apex',
)
"""Distributions whose versions decide what runs and how fast, besides torch."""

_SMI_FIELDS = ('name', 'driver_version', 'memory.total', 'power.limit')


def packages() -> dict[str, str]:
    """Versions of those of `PACKAGES` that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def builds() -> dict[str, str]:
    """Versions of Python, of torch and of what torch was built with."""
    found = {'python': platform.python_version(), 'torch': torch.__version__}
    if torch.version.cuda is not None:
        found['cuda'] = torch.version.cuda
    if torch.cuda.is_available():
        cudnn, nccl = torch.backends.cudnn.version(), torch.cuda.nccl.version()
        found['cudnn'] = str(cudnn)
        found['nccl'] = '.'.join(map(str, nccl)) if isinstance(nccl, tuple) else str(nccl)
    return found


def nvidia_smi(run: Callable[..., Any] = subprocess.run) -> list[dict[str, str]]:
    """What the driver says of the GPUs of this machine; nothing where there is no driver.

    Other than torch, it answers when torch has no CUDA or does not fit the driver.

    Args:
        run: `subprocess.run`, or a stand-in.

    Returns:
        `name`, `driver_version`, `memory.total` and `power.limit` of each.
    """
    command = ['nvidia-smi', f'--query-gpu={",".join(_SMI_FIELDS)}', '--format=csv,noheader']
    try:
        shown = run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if shown.returncode:
        return []
    rows = (line.split(', ') for line in shown.stdout.splitlines())
    return [
        dict(zip(_SMI_FIELDS, row, strict=True)) for row in rows if len(row) == len(_SMI_FIELDS)
    ]


def cpu_name(cpuinfo: Path = Path('/proc/cpuinfo')) -> str:
    """The processor's name, as the kernel has it."""
    try:
        lines = cpuinfo.read_text(encoding='utf-8').splitlines()
    except OSError:
        lines = []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()
