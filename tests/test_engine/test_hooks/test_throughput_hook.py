"""Speed by hand on a runner that only has what the hook reads."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from internlm_mm.engine.hooks import ThroughputHook, throughput_hook
from internlm_mm.models import InternLM
from internlm_mm.utils.flops import model_flops
from tests.helpers import tiny_runner


def fake_runner(model: nn.Module, max_iters: int = 10, world_size: int = 4) -> SimpleNamespace:
    return SimpleNamespace(
        flops_per_token=model_flops(model, 32),
        iter=0,
        max_iters=max_iters,
        world_size=world_size,
        strategy=SimpleNamespace(device=torch.device('cpu')),
    )


def run(hook: ThroughputHook, runner: SimpleNamespace, times: list[float]) -> list[dict]:
    """Steps of 1000 tokens that take `times` seconds, half a second of each waiting for data."""
    hook.before_train(runner)
    steps = []
    for iteration, seconds in enumerate(times):
        runner.iter = iteration
        outputs = {'num_tokens': 1000, 'time': seconds, 'data_time': 0.5}
        hook.after_train_iter(runner, iteration, outputs=outputs)
        steps.append(outputs)
    return steps


def test_speed_over_the_interval_without_the_first_step() -> None:
    steps = run(ThroughputHook(interval=3), fake_runner(nn.Linear(2, 2)), [100, 2, 3, 1, 1, 2])
    assert ['tgs' in step for step in steps] == [False, False, True, False, False, True]
    assert steps[2]['tokens_per_second'] == 2000 / 5
    assert steps[2]['tgs'] == 2000 / 5 / 4
    assert steps[2]['data_share'] == 1 / 5
    assert steps[2]['eta'] == 2.5 * 7  # seconds a step, steps to go
    assert steps[5]['tokens_per_second'] == 3000 / 4
    assert 'tflops' not in steps[5]  # a model of unknown sizes


def test_steps_passed_over_do_not_flatter() -> None:
    hook, runner = ThroughputHook(interval=4), fake_runner(nn.Linear(2, 2))
    hook.before_train(runner)
    for runner.iter, outputs in enumerate(
        [
            {'time': 9},
            {'time': 2},
            {'time': 0.01, 'passed_over': 1},
            last := {'time': 2},
        ]
    ):
        outputs |= {'num_tokens': 1000, 'data_time': 0.0}
        hook.after_train_iter(runner, runner.iter, outputs=outputs)
    assert last['tokens_per_second'] == 500
    assert last['eta'] == 2 * (runner.max_iters - 4)


def test_every_step() -> None:
    steps = run(ThroughputHook(interval=1), fake_runner(nn.Linear(2, 2)), [9, 2, 4])
    assert 'tgs' not in steps[0]
    assert [step['tokens_per_second'] for step in steps[1:]] == [500, 250]


def test_the_last_step_is_read_too() -> None:
    steps = run(ThroughputHook(interval=100), fake_runner(nn.Linear(2, 2), 3), [9, 2, 3])
    assert steps[2]['tokens_per_second'] == 400 and steps[2]['eta'] == 0


def test_arithmetic_and_utilisation(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device('meta'):
        model = InternLM(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_layers=2,
            num_heads=2,
            max_seq_len=64,
        )
    monkeypatch.setattr(throughput_hook, 'peak_flops', lambda device: 1e9)
    (_, step) = run(ThroughputHook(interval=1), fake_runner(model, world_size=2), [1, 2])
    # Two FLOPs a weight forward, four backward; the embedding is a look-up. Attention: scores and
    # their product with the values, two FLOPs for each of width x seq, times three.
    weights = sum(p.numel() for p in model.parameters()) - 64 * 32
    full = 6 * weights + 2 * (2 * 2 * 32 * 32) * 3
    causal = 6 * weights + 2 * (2 * 2 * 32 * 32) * 3 / 2
    assert step['tgs'] == 250
    assert step['tflops'] == pytest.approx(250 * full / 1e12)
    assert step['mfu_full'] == pytest.approx(250 * full / 1e9)
    assert step['mfu_causal'] == pytest.approx(250 * causal / 1e9)
    assert model_flops(model, 32).full == full


def test_in_a_run(tmp_path: Path) -> None:
    tiny_runner(tmp_path).train()
    assert 'tokens/s' in next(tmp_path.glob('*/*.log')).read_text()


def test_wrong_interval() -> None:
    with pytest.raises(ValueError, match='ThroughputHook: interval=0'):
        ThroughputHook(interval=0)
