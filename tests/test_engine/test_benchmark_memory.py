"""What fills memory, beside what was measured."""

from pathlib import Path

import pytest
import torch

from internlm_mm.engine.benchmark_memory import host_memory, reckon_memory, render_memory
from internlm_mm.parallel.mesh import Layout
from internlm_mm.registry import MODELS
from tests.helpers import tiny_config


def layout(**degrees: int) -> Layout:
    names = ('pipeline', 'data_replicate', 'data_shard', 'context', 'tensor')
    return Layout(**{name: degrees.get(name, 1) for name in names})


def test_masters_gradients_and_moments_are_in_host_memory(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, strategy=dict(type='HybridParallelStrategy', offload=True))
    before = config.pretty_text
    found = reckon_memory(config, layout())
    assert config.pretty_text == before
    with torch.device('meta'):
        sizes = [weight.numel() for weight in MODELS.build(config.model).parameters()]
    assert found['host_bytes'] == 16 * sum(sizes) + 4 * len(sizes)  # and a count of steps each
    assert found['kinds']['parameters'] == found['kinds']['optimizer'] == 0
    assert sum(found['kinds'].values()) == found['bytes'] > 0


def test_the_fullest_rank_of_a_layout(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    one = reckon_memory(config, layout())
    two = reckon_memory(config, layout(data_shard=2))
    assert two['kinds']['optimizer'] < 0.51 * one['kinds']['optimizer']
    staged = reckon_memory(config, layout(pipeline=2))
    assert 'unknown' not in staged and staged['bytes'] < one['bytes']


def test_a_run_that_cannot_be_rehearsed_says_why(tmp_path: Path) -> None:
    found = reckon_memory(tiny_config(tmp_path), layout(tensor=3))
    assert list(found) == ['unknown'] and '3' in found['unknown']
    assert render_memory({'memory': found}).endswith(found['unknown'])


def test_lines_for_a_person() -> None:
    gib = 2**30
    memory = {
        'rank': 0,
        'moment': 'loss, forward',
        'kinds': {'parameters': 0, 'gathered_gradients': 30 * gib, 'activations': 10 * gib},
        'bytes': 40 * gib,
        'host_bytes': 109 * gib,
    }
    measured = {
        'device_type': 'cuda',
        'peak_memory_bytes': 42 * gib,
        'reserved_memory_bytes': 45 * gib,
        'host_resident_bytes': 6 * gib,
        'host_pinned_bytes': 55 * gib,
    }
    assert render_memory({'memory': memory, **measured}).splitlines() == [
        'what fills memory, as the planner reckons: rank 0, loss, forward',
        '  gathered gradients          30.00 GiB   75.0%  ' + '#' * 30,
        '  activations                 10.00 GiB   25.0%  ' + '#' * 10,
        '  in all                      40.00 GiB',
        '  measured                    42.00 GiB   +5.0%; 45.00 GiB taken from the GPU',
        '  host memory                109.00 GiB',
        '  host memory, measured: 6.00 GiB resident in the process, 55.00 GiB page-locked',
    ]
    on_cpu = render_memory({'memory': memory, **measured, 'device_type': 'cpu'})
    assert '  measured' not in on_cpu


def test_host_memory_of_this_process() -> None:
    found = host_memory(torch.device('cpu'))
    assert list(found) == ['host_resident_bytes']
    with open('/proc/self/status', encoding='ascii') as file:
        (high,) = (line.split()[1] for line in file if line.startswith('VmHWM'))
    assert found['host_resident_bytes'] == pytest.approx(int(high) * 1024, rel=0.05)
