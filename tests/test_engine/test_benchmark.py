import gc
import math
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from internlm_mm.engine.benchmark import (
    FrameworkSteps,
    measure,
    peak_memory,
    render,
    summarise,
    time_steps,
)
from tests.helpers import tiny_runner

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


def test_steps_are_timed_one_by_one() -> None:
    naps = iter([0.0, 0.05, 0.0])
    first, slow, last = time_steps(lambda: time.sleep(next(naps)), 3, CPU)
    assert first < 0.02 and last < 0.02
    assert 0.05 <= slow < 0.1


class FakeSteps:
    """Steps of a known length on one CPU, over rows of 16 tokens, 8 rows a step."""

    def __init__(self, seconds: float, order: list[str]) -> None:
        loader = SimpleNamespace(
            batch_size=lambda iteration: 8, dataset=SimpleNamespace(seq_len=16)
        )
        self.runner = SimpleNamespace(
            strategy=SimpleNamespace(device=CPU),
            train_loop=SimpleNamespace(dataloader=loader),
            flops_per_token=None,  # a model without the usual sizes
            iter=0,
            world_size=1,
        )
        self.seconds, self.order = seconds, order

    def step(self) -> None:
        self.order.append('ours')
        time.sleep(self.seconds)


def test_two_loops_take_turns() -> None:
    order: list[str] = []

    def other() -> None:
        order.append('theirs')
        time.sleep(0.010)

    report = measure(FakeSteps(0.020, order), other, warmup=1, steps=3, blocks=2)
    a, b = 'ours', 'theirs'
    turns = [a, b, a, b, b, a, a, b, b, a, a, b, b, a]
    assert order == turns  # step by step, and each goes first every other time
    assert report['framework']['steps'] == report['bare']['steps'] == 6
    assert report['framework']['median'] == pytest.approx(0.020, rel=0.2)
    assert report['bare']['median'] == pytest.approx(0.010, rel=0.3)
    assert len(report['ratios']) == 2
    assert report['ratio_to_bare'] == statistics.median(report['ratios'])
    assert report['ratio_to_bare'] == pytest.approx(2.0, rel=0.3)
    assert report['tokens_per_second'] == pytest.approx(128 / report['framework']['median'])
    assert report['tgs'] == report['tokens_per_second']
    assert 'tflops_full' not in report
    text = render(report)
    assert f'framework / bare = {report["ratio_to_bare"]:.4f}' in text


def test_alone() -> None:
    report = measure(FakeSteps(0.002, []), None, warmup=0, steps=2, blocks=2)
    assert report['framework']['steps'] == 4
    assert 'ratio_to_bare' not in report
    assert 'bare' not in render(report)


def test_the_real_thing(tmp_path: Path) -> None:
    runner = tiny_runner(tmp_path, train_cfg__max_iters=100)
    steps = FrameworkSteps(runner)
    batches = steps.sample(3)
    assert [len(step) for step in batches] == [2, 2, 2]
    report = measure(steps, None, warmup=1, steps=2, blocks=2)
    assert runner.iter == 5
    # Sampling for another loop took nothing away from the framework.
    assert runner.train_loop.rows == 5 * 4
    assert report['tokens_per_second'] == pytest.approx(4 * 32 / report['framework']['median'])
    assert report['devices'] == 1 and report['device'] == 'cpu'
    parameters = 64 * 32 + 2 * (4 * (32 * 32 + 32) + 3 * 32 * 48 + 2 * 32) + 32
    flops = 6 * parameters + 12 * 2 * 32 * 32
    assert report['tflops_full'] == pytest.approx(report['tgs'] * flops / 1e12)
    steps.close()
    assert gc.isenabled()  # hooks have given back what they took
    assert 'mfu_full' not in report  # a CPU has no peak that is known
    assert math.isfinite(report['framework']['spread'])


def test_memory_is_counted_in_bytes() -> None:
    before = peak_memory(CPU)
    assert 50e6 < before < 100e9
    block = torch.ones(50_000_000)  # 200 MB
    assert peak_memory(CPU) >= before
    assert block.sum() == 5e7
