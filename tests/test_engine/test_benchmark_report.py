import hashlib
import json
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from internlm_mm.engine import benchmark_report
from internlm_mm.engine.benchmark_report import (
    add_breakdown,
    add_matmul_rate,
    check_records,
    config_hash,
    honest_line,
    peak_memory,
    rate_of_products,
    render,
    save_record,
    speed_report,
    summarise,
)
from internlm_mm.parallel.float8 import Float8
from internlm_mm.parallel.place import Techniques
from internlm_mm.parallel.recompute import recompute_layers
from internlm_mm.utils.flops import FlopsPerToken
from tests.helpers import tiny_config
from tests.ranks import Ranks

CPU = torch.device('cpu')


def test_summary_by_hand() -> None:
    times = summarise([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (times.median, times.minimum, times.maximum, times.steps) == (3.0, 1.0, 5.0, 5)
    # Quartiles by the exclusive method: 1.5 and 4.5.
    assert times.spread == (4.5 - 1.5) / 3.0
    assert summarise([2.0, 2.0]).spread == 0
    assert summarise([1.0, 2.0]).median == statistics.median([1.0, 2.0])


@pytest.mark.parametrize('seconds', [[], [1.0]])
def test_one_step_is_no_measurement(seconds: list) -> None:
    with pytest.raises(ValueError, match=f'at least 2 steps to measure, got {len(seconds)}'):
        summarise(seconds)


def runner_of(
    world_size: int = 1, recompute: float = 0.0, float8: Float8 | None = None, **changes: Any
) -> Any:
    part = torch.nn.Module()
    part.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(4))
    recompute_layers(part, recompute)
    return SimpleNamespace(
        world_size=world_size,
        flops_per_token=FlopsPerToken(6e9, 5e9, again_full=2e9, again_causal=1.5e9),
        strategy=SimpleNamespace(
            device=CPU,
            param_dtype=torch.bfloat16,
            reduce_dtype=torch.float32,
            techniques=Techniques(float8=float8),
            parts=[part, part],
            sum_over_ranks=lambda values: [value * world_size for value in values],
        ),
        **changes,
    )


def outputs(**changes: float) -> dict[str, float]:
    return dict(num_tokens=8000, num_targets=6000, data_time=0.1, skipped=0) | changes


def test_a_report_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, 8,000 tokens in 2 s, half of the layers recomputed, a peak of 100 TFLOP/s."""
    monkeypatch.setattr(benchmark_report, 'peak_flops', lambda device: 100e12)
    steps = [outputs(), outputs(num_targets=4000, skipped=1)]
    report = speed_report(runner_of(2, recompute=0.5), [2.0, 2.0], steps)
    assert report['tokens_per_second'] == 4000
    assert report['tgs'] == 2000
    assert report['useful_tgs'] == 1250
    assert report['data_share'] == 0.05
    assert report['skipped_steps'] == 1
    assert report['recomputed_share'] == 0.5
    assert (report['tflops_full'], report['tflops_causal']) == (12, 10)
    assert report['hardware_tflops_full'] == 14
    assert report['hardware_tflops_causal'] == 11.5
    assert report['mfu_full'] == pytest.approx(0.12)
    assert report['mfu_causal'] == pytest.approx(0.10)
    assert report['hfu_full'] == pytest.approx(0.14)
    assert report['hfu_causal'] == pytest.approx(0.115)
    add_matmul_rate(report, (80e12, 'bfloat16'))
    assert report['of_matmul_full'] == pytest.approx(12 / 80)
    assert report['of_matmul_causal'] == pytest.approx(10 / 80)
    report['peak_memory_bytes'] = 3 * 2**30
    assert honest_line(report) == (
        '2,000 tokens/s/device (1,250 trained) | 12.0 TFLOP/s full, 10.0 causal | '
        'MFU 12.0% full, 10.0% causal | HFU 14.0% full, 11.5% causal | 3.00 GiB | '
        '15.0% full, 12.5% causal of the 80 TFLOP/s that bfloat16 products reach here'
    )
    text = render(report)
    assert honest_line(report) in text.splitlines()
    assert '1 steps were skipped' in text and 'spread 0.0%), 5.0% of it waiting for data' in text
    assert json.loads(json.dumps(report)) == report


def test_frozen_weights_are_told_of() -> None:
    runner = runner_of()
    runner.flops_per_token = replace(runner.flops_per_token, trained_share=0.0054)
    report = speed_report(runner, [2.0, 2.0], [outputs(), outputs()])
    assert report['trained_share'] == 0.0054
    told = '0.54% of the weights are trained: FLOPs of the others are those of forward and of'
    assert told in render(report)
    assert 'are trained' not in render(speed_report(runner_of(), [2.0, 2.0], [outputs()] * 2))


def test_memory_at_its_limit_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    report = speed_report(runner_of(), [2.0, 2.0], [outputs(), outputs()])
    assert 'at its limit' not in render(report | {'allocator_flushes': 0})
    report |= dict(
        allocator_flushes=7, reserved_memory_bytes=70 * 2**30, peak_memory_bytes=60 * 2**30
    )
    told = 'gave its free blocks back to the GPU 7 times'
    assert told in render(report) and 'holds 70.00 GiB for 60.00 GiB' in render(report)
    stats = {'num_alloc_retries': 5, 'num_ooms': 1}
    monkeypatch.setattr(torch.cuda, 'memory_stats', lambda device: stats)
    assert benchmark_report.allocator_flushes(torch.device('cuda', 0)) == 5
    assert benchmark_report.allocator_flushes(torch.device('cpu')) == 0


def test_what_is_not_known_is_not_told() -> None:
    runner = runner_of()
    runner.flops_per_token = None
    report = speed_report(runner, [1.0, 1.0], [outputs()])
    add_matmul_rate(report, (1e12, 'bfloat16'))
    line = honest_line(report)
    assert 'FLOP' not in line and 'MFU' not in line and line.endswith(' GiB')
    report = speed_report(runner_of(), [1.0, 1.0], [outputs()])
    assert 'mfu_full' not in report  # a CPU has no peak that is known
    assert report['hardware_tflops_full'] == report['tflops_full']
    assert 'skipped' not in render(report)


def test_products_in_8_bits_are_compared_with_such_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(benchmark_report, 'matmul_rate', lambda device, dtype: 80e12)
    monkeypatch.setattr(benchmark_report, 'float8_matmul_rate', lambda device: 160e12)
    for float8, rate, header, end in (
        (None, (80e12, 'bfloat16'), 'bfloat16', 'of the 80 TFLOP/s that bfloat16 products'),
        (
            Float8(),
            (160e12, 'float8'),
            'bfloat16 with products in fp8 (tensorwise)',
            'of the 160 TFLOP/s that float8 products',
        ),
        (
            Float8(recipe='rowwise', emulate=True),
            None,
            'bfloat16 with products in fp8 (rowwise, emulated)',
            ' GiB',
        ),
    ):
        runner = runner_of(float8=float8)
        report = speed_report(runner, [2.0, 2.0], [outputs()] * 2)
        assert rate_of_products(runner.strategy) == rate
        add_matmul_rate(report, rate)
        assert report['dtype'] == 'bfloat16' and ('float8' in report) is (float8 is not None)
        assert f'{header}, gradients summed in float32' in render(report)
        assert honest_line(report).removesuffix(' reach here').endswith(end)


def test_what_the_bare_loop_lacks_is_told_of() -> None:
    report = speed_report(runner_of(), [2.0, 2.0], [outputs()] * 2)
    report |= dict(bare=dict(median=1.0, spread=0.0), ratios=[2.0, 2.0], ratio_to_bare=2.0)
    lines = render(report | {'beyond_bare': []}).splitlines()
    assert lines[-1] == 'framework / bare = 2.0000 (blocks: 2.0000, 2.0000)'
    lines = render(report | {'beyond_bare': ['this', 'that']}).splitlines()
    assert lines[-1] == 'the framework alone has this; that'


def test_parts_and_the_timed_step() -> None:
    report = {'framework': {'median': 0.9}}
    add_breakdown(report, {'parts_ms': {'matmul': 600.0, 'idle': 350.0}, 'step_ms': 950.0})
    assert report['breakdown']['timed_step_ms'] == 900
    assert report['breakdown']['remainder_ms'] == pytest.approx(-50)


def most_here(values: list[int]) -> int:
    return benchmark_report.most_of_ranks(values[torch.distributed.get_rank()])


def test_the_fullest_rank_counts(two_ranks: Ranks) -> None:
    assert two_ranks(most_here, [2**40, 7]) == [2**40, 2**40]


def test_memory_is_counted_in_bytes() -> None:
    before = peak_memory(CPU)
    assert 50e6 < before < 100e9
    block = torch.ones(50_000_000)  # 200 MB
    assert peak_memory(CPU) >= before
    assert block.sum() == 5e7


def test_records(tmp_path: Path) -> None:
    folder = tmp_path / 'a' / 'b'
    report = {'tgs': 1.5, 'command': ['tools/benchmark.py', 'x']}
    paths = {save_record(folder, report, 'x', 'ab' * 32) for _ in range(3)}
    assert len(paths) == 3  # in one second, too
    for path in paths:
        record = json.loads(path.read_text())
        assert path.name.startswith('x_20') and 'abababab' in path.name
        assert (record['tgs'], record['name']) == (1.5, 'x')
        assert record['versions']['torch'] == torch.__version__
        assert record['config_sha256'] == 'ab' * 32
        assert record['date'].endswith('+00:00') and record['cpu']


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_records(tmp_path / 'a' / 'b')
    check_records(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    check_records(Path('work_dirs/benchmarks'))
    (tmp_path / 'file').touch()
    with pytest.raises(NotADirectoryError, match=r'--records file/a: /.*/file is no folder'):
        check_records(Path('file/a'))
    with pytest.raises(PermissionError, match=r'--records /proc/a/b: nothing .* into /proc: .'):
        check_records(Path('/proc/a/b'))  # which the superuser cannot write into, either


def test_a_record_without_a_config(tmp_path: Path) -> None:
    path = save_record(tmp_path, {}, 'data')
    assert path.stem.count('_') == 2 and 'config_sha256' not in json.loads(path.read_text())


def test_the_hash_is_the_config_s(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, experiment_name='a')
    again = tiny_config(tmp_path, experiment_name='a')
    other = tiny_config(tmp_path, experiment_name='a', train_cfg__max_iters=7)
    assert config_hash(config) == config_hash(again) != config_hash(other)
    assert len(config_hash(config)) == hashlib.sha256().digest_size * 2
