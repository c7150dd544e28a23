import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from internlm_mm.doctor.problems import (
    Facts,
    find_problems,
    gather_facts,
    unmet_requirements,
)
from internlm_mm.utils.apex import has_apex

H200 = ('NVIDIA H200', (9, 0))
V100 = ('Tesla V100-SXM2-16GB', (7, 0))
B200 = ('NVIDIA B200', (10, 0))
SMI = [{'name': 'NVIDIA H200', 'driver_version': '535.104.05'}]
ARCHITECTURES = ['sm_75', 'sm_80', 'sm_86', 'sm_90']


def texts(**facts) -> list[str]:
    return [f'{what} -> {cure}' for what, cure in find_problems(Facts(**facts))]


def test_nothing_is_wrong_with_a_sound_machine() -> None:
    assert not texts(
        packages={'mmengine-lite': '0.10.7'},
        torch='2.11.0',
        torch_cuda='13.0',
        cuda_works=True,
        driver_gpus=[{'name': 'NVIDIA H200', 'driver_version': '580.159.04'}] * 2,
        capabilities=[H200, H200],
        architectures=ARCHITECTURES,
        settings={'NCCL_DEBUG': 'WARN', 'CUDA_VISIBLE_DEVICES': '0,1', 'NCCL_P2P_DISABLE': '0'},
        apex_is_nvidia_s=True,
        shared_bytes=64 << 30,
        descriptors=1_048_576,
    )
    assert not texts(settings={'CUDA_VISIBLE_DEVICES': ''})  # and there is no GPU to hide


@pytest.mark.parametrize(
    ('facts', 'words'),
    [
        (
            dict(packages={'mmengine': '0.10.7', 'mmengine-lite': '0.10.7'}),
            ['are both installed', 'pip uninstall -y mmengine mmengine-lite'],
        ),
        (
            dict(unmet=[('transformers<6,>=5.10', '4.57.0')]),
            ['needs transformers<6,>=5.10; 4.57.0 is', "pip install 'transformers<6,>=5.10'"],
        ),
        (dict(apex_is_nvidia_s=False), ["which is not NVIDIA's", 'pip uninstall -y apex']),
        (
            dict(driver_gpus=SMI, torch='2.13.0+cpu'),
            ['NVIDIA H200', 'torch 2.13.0+cpu was built without CUDA', "'torch==2.13.0'"],
        ),
        (
            dict(driver_gpus=SMI, torch_cuda='13.0'),
            ['driver 535.104.05 is too old for torch with CUDA 13.0, which needs 580'],
        ),
        (
            dict(driver_gpus=SMI, torch_cuda='12.6'),
            ['torch with CUDA 12.6 cannot use NVIDIA H200', '--gpus all'],
        ),
        (
            dict(capabilities=[V100], architectures=['sm_70', 'sm_90'], cuda_works=True),
            ['V100', 'neither bfloat16', 'precision.param=float16', 'loss_scale.initial=65536.0'],
        ),
        (
            dict(capabilities=[V100, V100], architectures=ARCHITECTURES, torch='2.11.0'),
            ['torch 2.11.0 has no kernels for Tesla V100-SXM2-16GB (sm_70)', 'sm_75, sm_80'],
        ),
        (
            dict(capabilities=[H200, ('NVIDIA L4', (8, 9))], architectures=ARCHITECTURES),
            ['the GPUs differ: NVIDIA H200, NVIDIA L4'],
        ),
        (
            dict(settings={'NCCL_P2P_DISABLE': '1'}),
            ['NCCL_P2P_DISABLE=1: GPUs of one machine', 'unset NCCL_P2P_DISABLE'],
        ),
        (
            dict(settings={'CUDA_VISIBLE_DEVICES': ''}, driver_gpus=SMI, torch_cuda='12.6'),
            ['the GPUs of this machine are hidden'],
        ),
        (
            dict(settings={'NCCL_ASYNC_ERROR_HANDLING': '1'}),
            ['no longer read', 'set TORCH_NCCL_ASYNC_ERROR_HANDLING'],
        ),
        (dict(shared_bytes=64 << 20), ['/dev/shm has 64 MiB', '--shm-size=8g']),
        (dict(descriptors=256), ['may open 256 files', 'ulimit -n']),
    ],
)
def test_each_problem_and_its_cure(facts: dict, words: list[str]) -> None:
    found = texts(**facts)
    assert any(all(word in text for word in words) for text in found), found


@pytest.mark.parametrize(
    ('architectures', 'runs'),
    [
        (['sm_80', 'sm_90'], False),  # code for 9.0 runs on no 10.0
        (['sm_90', 'compute_90'], True),  # compiled there
        (['sm_100'], True),
        (['sm_100a'], True),
        (['compute_103'], False),
        ([], True),  # nobody said
    ],
)
def test_kernels_for_a_gpu(architectures: list[str], runs: bool) -> None:
    assert bool(texts(capabilities=[B200], architectures=architectures)) != runs


def test_the_full_mmengine_will_do() -> None:
    unmet = [('mmengine-lite<0.12,>=0.10.7', 'nothing')]
    assert texts(unmet=unmet)
    assert not texts(unmet=unmet, packages={'mmengine': '0.10.7'})


def test_requirements() -> None:
    installed = {'torch': '2.11.0+cu130', 'transformers': '6.0.0', 'numpy': '2.0.0rc1'}

    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    wanted = [
        'torch>=2.11',
        'transformers<6,>=5.10',
        'numpy>=2.0.0rc1',
        'rich',
        "pyarrow; extra == 'parquet'",
        "tomli; python_version < '3.0'",
    ]
    assert unmet_requirements(wanted, version) == [
        ('transformers<6,>=5.10', '6.0.0'),
        ('rich', 'nothing'),
    ]


@pytest.mark.parametrize('folder', ['optimizers', 'reverse', None])
def test_whose_apex_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str | None
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    if folder is not None:
        (tmp_path / 'apex' / folder).mkdir(parents=True)
        (tmp_path / 'apex' / '__init__.py').write_text('raise ImportError("was imported")')
    assert has_apex('optimizers') == {'optimizers': True, 'reverse': False, None: None}[folder]
    assert 'apex' not in sys.modules


def test_this_machine() -> None:
    facts = gather_facts()
    assert facts.torch == torch.__version__ and facts.descriptors > 0
    assert 'transformers' in facts.packages
    assert not facts.unmet  # what the tests run with is what is asked for
