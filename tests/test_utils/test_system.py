import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch

from internlm_mm.utils.system import available_memory, builds, cpu_name, nvidia_smi, packages


def test_versions() -> None:
    found = packages()
    assert found['transformers'] == version('transformers')
    assert 'apex' not in found  # what is not installed is not listed
    assert builds()['torch'] == torch.__version__


def test_what_the_driver_says() -> None:
    text = 'NVIDIA H200, 580.159.04, 143771 MiB, 700.00 W\nNVIDIA H200, 580.159.04, 1 MiB, [N/A]\n'
    commands = []

    def run(command, **options):
        commands.append(command)
        return SimpleNamespace(returncode=0, stdout=text)

    gpus = nvidia_smi(run)
    assert commands[0][0] == 'nvidia-smi'
    assert [gpu['name'] for gpu in gpus] == ['NVIDIA H200'] * 2
    assert gpus[0] == {
        'name': 'NVIDIA H200',
        'driver_version': '580.159.04',
        'memory.total': '143771 MiB',
        'power.limit': '700.00 W',
    }


def test_no_driver() -> None:
    def missing(command, **options):
        raise FileNotFoundError(command[0])

    def slow(command, **options):
        raise subprocess.TimeoutExpired(command, options['timeout'])

    def failing(command, **options):
        return SimpleNamespace(returncode=9, stdout="couldn't communicate with the driver, a, b, c")

    assert nvidia_smi(missing) == nvidia_smi(slow) == nvidia_smi(failing) == []


def test_the_processor(tmp_path: Path) -> None:
    file = tmp_path / 'cpuinfo'
    file.write_text('processor\t: 0\nmodel name\t: AMD EPYC 9\nmodel name\t: AMD EPYC 9\n')
    assert cpu_name(file) == 'AMD EPYC 9'
    assert cpu_name(tmp_path / 'none')


def test_memory_that_is_left(write: Callable, tmp_path: Path) -> None:
    assert available_memory(tmp_path / 'none') is None
    write('proc/meminfo', 'MemTotal: 8000 kB\nMemAvailable: 3000 kB\nSwapTotal: 0 kB\n')
    assert available_memory(tmp_path) == 3000 * 1024
    write('sys/fs/cgroup/memory.max', '2048000\n')  # of a container
    assert available_memory(tmp_path) == 2000 * 1024
    assert (available_memory() or 1) > 0
