import json
from collections.abc import Callable

import pytest
import torch

from internlm_mm.doctor import examination
from internlm_mm.doctor.examination import (
    describe_devices,
    examine,
    measure_rates,
    render_examination,
    training_dtype,
)
from internlm_mm.doctor.problems import Problem
from tests.ranks import Ranks

CPU = torch.device('cpu')


@pytest.fixture
def fixed_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    fix(monkeypatch.setattr)


def fix(set_attribute: Callable) -> None:
    for name, rate in (('matmul_rate', 2e12), ('copy_rate', 3e9), ('all_reduce_rate', 4e9)):
        set_attribute(examination, name, lambda *args, rate=rate: rate)


def test_a_report_of_this_machine(fixed_rates: None, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [Problem('it is slow', 'buy another')]
    monkeypatch.setattr(examination, 'find_problems', lambda facts: problems)
    monkeypatch.setattr(
        examination, 'examine_attentions', lambda device, dtype, seconds: {'auto': {}}
    )
    report = examine(CPU, 0.1)
    assert json.loads(json.dumps(report)) == report
    assert report['ranks'] == 1 and report['attention_dtype'] == 'float32'
    assert report['rates'] == {'matmul_float32': 2e12, 'copy': 3e9}
    assert report['versions']['torch'] == torch.__version__
    assert report['kernels']['strategy.kernels.norm=torch'] == []
    lines = render_examination(report).splitlines()
    assert '  it is slow' in lines and '    -> buy another' in lines
    (matmul,) = (line for line in lines if 'matmul float32' in line)
    assert '2.000 TFLOP/s, [512, 1024] x [1024, 2752] and both gradients' in matmul
    (copy,) = (line for line in lines if line.startswith('  copy'))
    assert '3.00 GB/s' in copy
    assert examine(CPU, 0.0)['rates'] == {}


def test_backends_as_lines() -> None:
    works = {'works': True, 'forward_tflops': 0.5, 'both_tflops': 0.25}
    report = {
        'devices': [
            dict(type='cuda', name='NVIDIA H200', capability='sm_90', memory_bytes=2**37,
                 peak_tflops=989.0),
            dict(type='cpu', name='EPYC', cores=4, threads=2),
        ],
        'ranks': 2,
        'versions': {'torch': '2.11.0'},
        'settings': {'NCCL_DEBUG': 'INFO'},
        'attention_dtype': 'bfloat16',
        'attention': {
            'auto': {'dense': {'choice': 'cudnn', 'why': 'fastest'}},
            'cudnn': {'dense': works, 'packed': {'works': False, 'why': 'takes one document'}},
        },
        'kernels': {'strategy.float8': [], 'strategy.kernels.norm=x': ['is old', 'is not here']},
        'rates': {'matmul_float8': 1e15, 'all_reduce': 4e11, 'host_to_device': 5e10},
        'problems': [],
    }  # fmt: skip
    text = render_examination(report)
    for line in (
        '  NVIDIA H200, sm_90, 128.0 GiB, 989 TFLOP/s bf16',
        '  EPYC, 4 cores, torch uses 2',
        '  NCCL_DEBUG=INFO',
        '  auto, dense rows: cudnn (fastest)',
        '  cudnn, dense rows: works, 0.5 TFLOP/s forward, 0.25 with backward',
        '  cudnn, packed rows: takes one document',
        '  strategy.float8: can run',
        '  strategy.kernels.norm=x: is old; is not here',
        '  matmul float8     1,000.000 TFLOP/s, [8192, 4096] x [4096, 11008]',
        '  all reduce           400.00 GB/s, on the bus, 2 ranks',
        '  none that is known',
    ):
        assert line in text.splitlines()


def rates_here() -> dict[str, float]:
    before = {name: getattr(examination, name) for name in ('matmul_rate', 'copy_rate')}
    try:
        for name in before:
            setattr(examination, name, lambda *args: 1.0)
        return measure_rates(CPU, 0.01)
    finally:
        for name, function in before.items():
            setattr(examination, name, function)


def test_several_ranks_measure_their_sum(two_ranks: Ranks) -> None:
    for rates in two_ranks(rates_here):
        assert rates['all_reduce'] > 1e6


def test_devices() -> None:
    *gpus, cpu = describe_devices()
    assert len(gpus) == torch.cuda.device_count()
    assert cpu['type'] == 'cpu' and cpu['cores'] >= 1
    assert cpu['threads'] == torch.get_num_threads()


@pytest.mark.parametrize(
    ('capability', 'dtype'), [((9, 0), torch.bfloat16), ((7, 5), torch.float16)]
)
def test_what_gpus_train_in(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    assert training_dtype(torch.device('cuda', 0)) is dtype
    assert training_dtype(CPU) is torch.float32
