"""Installations and settings that are known not to work, or to work slowly, each with its cure."""

import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

import torch
from packaging.requirements import Requirement

from internlm_mm.utils.apex import has_apex
from internlm_mm.utils.installation import FIX
from internlm_mm.utils.launch import settings
from internlm_mm.utils.system import nvidia_smi, packages

Capability = tuple[int, int]

# Oldest drivers that run a major version of CUDA, from NVIDIA's release notes.
_DRIVERS = {'11': 450, '12': 525, '13': 580}

_SETTINGS: dict[tuple[str, str], str] = {
    ('NCCL_P2P_DISABLE', '1'): 'GPUs of one machine talk through host memory',
    ('NCCL_SHM_DISABLE', '1'): 'GPUs without NVLink talk through the network',
    ('NCCL_IB_DISABLE', '1'): 'machines talk over TCP in place of InfiniBand',
    ('NCCL_DEBUG', 'TRACE'): 'NCCL writes down every call',
    ('TORCH_NCCL_BLOCKING_WAIT', '1'): 'the host waits for every collective',
    ('CUDA_LAUNCH_BLOCKING', '1'): 'the host waits for every kernel',
    ('PYTORCH_NO_CUDA_MEMORY_CACHING', '1'): 'every tensor is allocated by the driver',
    ('CUDA_VISIBLE_DEVICES', ''): 'the GPUs of this machine are hidden',
    ('TORCH_COMPILE_DISABLE', '1'): 'strategy.compile does nothing',
}
"""Variables with values that are meant for finding errors, and what they cost."""

_RENAMED = {
    'NCCL_ASYNC_ERROR_HANDLING': 'TORCH_NCCL_ASYNC_ERROR_HANDLING',
    'NCCL_BLOCKING_WAIT': 'TORCH_NCCL_BLOCKING_WAIT',
}
_SHARED_BYTES = 1 << 30
_DESCRIPTORS = 1024


class Problem(NamedTuple):
    """What is wrong, and what to do about it."""

    what: str
    cure: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What problems are found from.

    Attributes:
        packages: Versions of what is installed, by distribution.
        unmet: Requirements of internlm_mm that are not met, and what is there instead.
        torch: torch's version.
        torch_cuda: The CUDA it was built with, or None.
        cuda_works: Whether torch can use a GPU.
        driver_gpus: What `nvidia_smi` says.
        capabilities: Name and compute capability of the GPUs that torch sees.
        architectures: What torch has kernels for: 'sm_90', 'compute_90'.
        settings: Variables of the environment.
        apex_is_nvidia_s: Whether a package `apex` is NVIDIA's; None if there is none.
        shared_bytes: Size of /dev/shm; None where there is none.
        descriptors: Files that a process may open.
    """

    packages: Mapping[str, str] = field(default_factory=dict)
    unmet: Sequence[tuple[str, str]] = ()
    torch: str = ''
    torch_cuda: str | None = None
    cuda_works: bool = False
    driver_gpus: Sequence[Mapping[str, str]] = ()
    capabilities: Sequence[tuple[str, Capability]] = ()
    architectures: Sequence[str] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    apex_is_nvidia_s: bool | None = None
    shared_bytes: int | None = None
    descriptors: int = _DESCRIPTORS


def gather_facts() -> Facts:
    """Look at this machine; changes nothing and allocates nothing on a GPU."""
    works = torch.cuda.is_available()
    indices = range(torch.cuda.device_count()) if works else range(0)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    shared = Path('/dev/shm')
    return Facts(
        packages=packages(),
        unmet=unmet_requirements(_requirements()),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        cuda_works=works,
        driver_gpus=nvidia_smi(),
        capabilities=[
            (torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in indices
        ],
        architectures=torch.cuda.get_arch_list() if works else [],
        settings=settings(),
        apex_is_nvidia_s=has_apex('optimizers'),
        shared_bytes=shutil.disk_usage(shared).total if shared.is_dir() else None,
        descriptors=sys.maxsize if soft == resource.RLIM_INFINITY else soft,
    )


def _requirements() -> list[str]:
    try:
        return requires('internlm_mm') or []
    except PackageNotFoundError:  # run from a checkout that is not installed
        return []


def find_problems(facts: Facts) -> list[Problem]:
    """Everything that is known to go wrong with such facts."""
    searches: list[Callable[[Facts], Iterator[Problem]]] = [_packages, _gpus, _settings, _limits]
    return [problem for search in searches for problem in search(facts)]


def unmet_requirements(
    wanted: Sequence[str], installed: Callable[[str], str] = version
) -> list[tuple[str, str]]:
    """Requirements that are not met, each with the version that is there or 'nothing'.

    Args:
        wanted: As in a distribution's metadata; those of extras are left out.
        installed: Version of a distribution; raises PackageNotFoundError.
    """
    found = []
    for text in wanted:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({'extra': ''}):
            continue
        try:
            there = installed(requirement.name)
        except PackageNotFoundError:
            there = 'nothing'
        if there == 'nothing' or not requirement.specifier.contains(there, prereleases=True):
            found.append((f'{requirement.name}{requirement.specifier}', there))
    return found


def _packages(facts: Facts) -> Iterator[Problem]:
    if {'mmengine', 'mmengine-lite'} <= facts.packages.keys():
        yield Problem('mmengine and mmengine-lite are both installed and share their files', FIX)
    for wanted, there in facts.unmet:
        if wanted.startswith('mmengine-lite') and 'mmengine' in facts.packages:
            continue  # the full package will do
        yield Problem(
            f'internlm_mm needs {wanted}; {there} is installed', f"pip install '{wanted}'"
        )
    if facts.apex_is_nvidia_s is False:
        yield Problem(
            "the package called apex on PyPI is installed, which is not NVIDIA's",
            "pip uninstall -y apex; NVIDIA's is built from https://github.com/NVIDIA/apex",
        )


def _gpus(facts: Facts) -> Iterator[Problem]:
    if facts.driver_gpus and facts.torch_cuda is None:
        gpu = facts.driver_gpus[0]['name']
        plain = facts.torch.partition('+')[0]
        yield Problem(
            f'there is a GPU ({gpu}), but torch {facts.torch} was built without CUDA',
            f"pip install --force-reinstall 'torch=={plain}' from PyPI, or make install "
            "TORCH='torch==2.11.0'",
        )
    elif facts.driver_gpus and not facts.cuda_works:
        yield _unusable(facts.driver_gpus[0], facts.torch_cuda or '')
    for name, capability in dict.fromkeys(facts.capabilities):
        number = ''.join(map(str, capability))
        if not _has_kernels(capability, facts.architectures):
            yield Problem(
                f'torch {facts.torch} has no kernels for {name} (sm_{number})',
                f'install a build of torch for it; this one has {", ".join(facts.architectures)}',
            )
        elif capability < (8, 0):
            yield Problem(
                f'{name} (sm_{number}) has neither bfloat16 products nor FlashAttention',
                'train with strategy.precision.param=float16 '
                'optim_wrapper.loss_scale.initial=65536.0',
            )
    names = {name for name, _ in facts.capabilities}
    if len(names) > 1:
        yield Problem(
            f'the GPUs differ: {", ".join(sorted(names))}',
            'the slowest decides; choose equal ones with CUDA_VISIBLE_DEVICES',
        )


def _unusable(gpu: Mapping[str, str], cuda: str) -> Problem:
    least = _DRIVERS.get(cuda.partition('.')[0])
    driver = gpu['driver_version']
    if least is not None and int(driver.partition('.')[0]) < least:
        return Problem(
            f'driver {driver} is too old for torch with CUDA {cuda}, which needs {least} or newer',
            'update the driver, or install a build of torch for an older CUDA',
        )
    return Problem(
        f'torch with CUDA {cuda} cannot use {gpu["name"]}, which driver {driver} shows',
        'python -c "import torch; torch.zeros(1).cuda()" says why; in a container, start it with '
        '--gpus all',
    )


def _has_kernels(capability: Capability, architectures: Sequence[str]) -> bool:
    """Whether code for one of `architectures` runs: same major version, or compiled there."""
    if not architectures:
        return True
    for architecture in architectures:
        kind, _, number = architecture.partition('_')
        digits = ''.join(character for character in number if character.isdigit())
        built = (int(digits[:-1]), int(digits[-1]))
        compiled_there = kind == 'compute' and built <= capability
        if compiled_there or (built[0] == capability[0] and built <= capability):
            return True
    return False


def _settings(facts: Facts) -> Iterator[Problem]:
    for (name, value), cost in _SETTINGS.items():
        if facts.settings.get(name) == value and (value or facts.driver_gpus):
            yield Problem(f'{name}={value}: {cost}', f'unset {name}')
    for old, new in _RENAMED.items():
        if old in facts.settings:
            yield Problem(f'{old} is no longer read', f'set {new} in its place')


def _limits(facts: Facts) -> Iterator[Problem]:
    if facts.shared_bytes is not None and facts.shared_bytes < _SHARED_BYTES:
        yield Problem(
            f'/dev/shm has {facts.shared_bytes / 2**20:,.0f} MiB: processes that read data hand '
            'batches over in it, and NCCL buffers',
            'start the container with --shm-size=8g or --ipc=host',
        )
    if facts.descriptors < _DESCRIPTORS:
        yield Problem(
            f'a process may open {facts.descriptors} files', f'ulimit -n {16 * _DESCRIPTORS}'
        )
