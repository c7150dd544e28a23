import os

import pytest
import torch

from internlm_mm.utils.device import (
    available_cores,
    device_of,
    dtype_of,
    peak_flops,
    pick_device,
    release_cached,
    synchronize,
)


def test_the_cpu_where_there_is_no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert pick_device(3) == torch.device('cpu')


def test_one_gpu_a_process(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert pick_device(1) == torch.device('cuda', 1)
    with pytest.raises(ValueError, match='process 2 of this machine has no GPU: 2 visible'):
        pick_device(2)


def test_a_device_by_its_name(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert device_of(None) == device_of('cpu') == torch.device('cpu')
    with pytest.raises(ValueError, match=r"no device 'cudaa'. Did you mean 'cuda'"):
        device_of('cudaa')
    with pytest.raises(ValueError, match="no device 'cuda:x'"):
        device_of('cuda:x')
    with pytest.raises(ValueError, match="no device 'cuda': of GPUs PyTorch sees none; 'cpu'"):
        device_of('cuda')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert device_of(None) == torch.device('cuda')
    assert device_of(torch.device('cuda', 1)) == torch.device('cuda', 1)
    with pytest.raises(ValueError, match="no device 'cuda:2': of GPUs PyTorch sees only 2"):
        device_of('cuda:2')


@pytest.mark.parametrize(
    ('name', 'peak'),
    [
        ('NVIDIA H200', 989e12),
        ('NVIDIA H20', 148e12),
        ('NVIDIA H100 80GB HBM3', 989e12),
        ('NVIDIA H100 PCIe', 756e12),
        ('NVIDIA H100 NVL', 835e12),
        ('NVIDIA A100-SXM4-80GB', 312e12),
        ('NVIDIA L40S', 362e12),
        ('NVIDIA L4', 121e12),
        ('NVIDIA B200', 2250e12),
        ('NVIDIA GeForce RTX 4090', 165e12),
        ('NVIDIA L40', 181e12),
        ('Some other thing', None),
    ],
)
def test_peaks(monkeypatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    assert peak_flops(torch.device('cuda', 0)) == peak


def test_no_peak_of_a_cpu() -> None:
    assert peak_flops(torch.device('cpu')) is None


def test_waiting_for_a_cpu_is_nothing() -> None:
    synchronize(torch.device('cpu'))


def test_dtypes_by_name() -> None:
    assert dtype_of('bfloat16') is torch.bfloat16
    for name in ('bf16', 'int8', 'Tensor', 'torch.float32', ''):
        with pytest.raises(ValueError, match='is not a floating-point dtype'):
            dtype_of(name)


def test_memory_goes_back_to_a_gpu(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: calls.append('emptied'))
    release_cached(torch.device('cpu'))
    assert not calls
    release_cached(torch.device('cuda', 0))
    assert calls == ['emptied']


@pytest.mark.parametrize(
    ('cores', 'ranks', 'gpus', 'expected'),
    [(32, '2', 2, 16), (32, None, 8, 4), (2, None, 0, 2), (2, '8', 0, 1), (6, '', 4, 1)],
)
def test_cores_are_shared_by_the_ranks_of_a_machine(
    monkeypatch, cores: int, ranks: str | None, gpus: int, expected: int
) -> None:
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(cores)))
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
    monkeypatch.delenv('LOCAL_WORLD_SIZE', raising=False)
    if ranks is not None:
        monkeypatch.setenv('LOCAL_WORLD_SIZE', ranks)
    assert available_cores() == expected
