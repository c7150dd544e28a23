import gc
import math
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from internlm_mm.engine.benchmark import FrameworkSteps, measure, time_steps
from internlm_mm.engine.benchmark_report import render
from internlm_mm.engine.breakdown import KINDS
from internlm_mm.parallel.place import Techniques
from tests.helpers import tiny_runner

CPU = torch.device('cpu')


def test_steps_are_timed_one_by_one() -> None:
    naps = iter([0.0, 0.05, 0.0])
    first, slow, last = time_steps(lambda: time.sleep(next(naps)), 3, CPU)
    assert first < 0.02 and last < 0.02
    assert 0.05 <= slow < 0.1


class FakeSteps:
    """Steps of a known length on one CPU, over rows of 16 tokens, 8 rows a step."""

    def __init__(self, seconds: float, order: list[str]) -> None:
        self.runner = SimpleNamespace(
            strategy=SimpleNamespace(
                device=CPU,
                param_dtype=torch.float32,
                reduce_dtype=torch.float32,
                techniques=Techniques(),
            ),
            flops_per_token=None,  # a model without the usual sizes
            world_size=1,
        )
        self.seconds, self.order = seconds, order
        self.outputs: list[dict[str, float]] = []

    def step(self) -> None:
        self.order.append('ours')
        step = dict(num_tokens=128, num_targets=96, data_time=self.seconds / 4, skipped=0)
        self.outputs.append(step)
        time.sleep(self.seconds)

    def forget(self) -> None:
        self.outputs.clear()


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
    assert report['useful_tgs'] == pytest.approx(0.75 * report['tgs'])
    assert report['bare_seconds'] != report['step_seconds']
    assert 'tflops_full' not in report
    text = render(report)
    assert f'framework / bare = {report["ratio_to_bare"]:.4f}' in text


def test_alone() -> None:
    report = measure(FakeSteps(0.002, []), None, warmup=0, steps=2, blocks=2)
    assert report['framework']['steps'] == len(report['step_seconds']) == 4
    assert 'first_step_seconds' not in report
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
    assert report['devices'] == 1 and report['device_type'] == 'cpu'
    assert report['first_step_seconds'] > 0
    # Five, nine or fourteen tokens a document, the last of each untrained.
    assert 0.7 < report['useful_tgs'] / report['tgs'] < 0.95
    assert 0 < report['data_share'] < 1 and report['skipped_steps'] == 0
    parameters = 64 * 32 + 2 * (4 * (32 * 32 + 32) + 3 * 32 * 48 + 2 * 32) + 32
    flops = 6 * parameters + 12 * 2 * 32 * 32
    assert report['tflops_full'] == pytest.approx(report['tgs'] * flops / 1e12)
    steps.close()
    assert gc.isenabled()  # hooks have given back what they took
    assert 'mfu_full' not in report  # a CPU has no peak that is known
    assert math.isfinite(report['framework']['spread'])


def test_parts_of_real_steps(tmp_path: Path) -> None:
    runner = tiny_runner(tmp_path, train_cfg__max_iters=100)
    steps = FrameworkSteps(runner)
    steps.step()
    found = steps.profile(2)
    assert runner.iter == 4 and found['steps'] == 2
    parts = found['parts_ms']
    assert list(parts) == list(KINDS)
    assert sum(parts.values()) == pytest.approx(found['step_ms'])
    done = ('matmul', 'attention', 'norm and clip', 'optimizer', 'elementwise')
    for kind in (*done, 'data wait', 'idle'):
        assert parts[kind] > 0, kind
    for kind in ('exposed communication', 'exposed host copies', 'host optimizer'):
        assert parts[kind] == 0, kind
    steps.step()  # nothing is left of the marks
    assert 'update_params' not in vars(runner.optim_wrapper)
    assert steps._steps.gi_code.co_name != '_marked'
    with pytest.raises(ValueError, match='need at least 1 step to break down, got 0'):
        steps.profile(0)
    steps.close()


def test_other_ranks_step_along(tmp_path: Path) -> None:
    runner = tiny_runner(tmp_path, train_cfg__max_iters=100)
    steps = FrameworkSteps(runner)
    runner.strategy._rank, before = 1, runner.iter
    assert runner.rank == 1
    assert steps.profile(2) == {}
    assert runner.iter == before + 3
    steps.close()
