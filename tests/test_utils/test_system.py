import subprocess
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch

from internlm_mm.utils.system import builds, cpu_name, nvidia_smi, packages


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
