import time

import pytest
import torch

from internlm_mm.utils import rates
from internlm_mm.utils.rates import (
    all_reduce_rate,
    copy_rate,
    float8_matmul_rate,
    matmul_rate,
    repeat_for,
)
from tests.ranks import Ranks

CPU = torch.device('cpu')


def test_one_call_s_share(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(rates.time, 'perf_counter', lambda: clock[0])
    calls = []

    def step() -> None:
        calls.append(clock[0])
        clock[0] += 0.25

    assert repeat_for(step, 1.0, CPU) == 0.25
    assert len(calls) == 1 + 4  # one that is not counted
    assert repeat_for(step, 0.0, CPU) == 0.25
    assert len(calls) == 5 + 1 + 3


def test_short_calls_are_timed_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, readings = [0.0], [0]

    def read() -> float:
        readings[0] += 1
        return clock[0]

    monkeypatch.setattr(rates.time, 'perf_counter', read)

    def step() -> None:
        clock[0] += 1e-4

    assert repeat_for(step, 1.0, CPU) == pytest.approx(1e-4)
    assert readings[0] < 100  # for over ten thousand calls


def test_a_product_s_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three products of [3, 5] x [5, 7] in a second: 2 FLOPs for each of 105 pairs, three times."""
    ran = []

    def once(step, seconds, device) -> float:
        ran.append((step(), seconds))
        return 1.0

    monkeypatch.setattr(rates, 'repeat_for', once)
    assert matmul_rate(CPU, torch.float32, 0.5, (3, 5, 7)) == 6 * 3 * 5 * 7
    assert ran == [(None, 0.5)]


def test_a_product_in_float8() -> None:
    x = torch.randn(16, 32).to(torch.float8_e4m3fn)
    w = torch.randn(48, 32).to(torch.float8_e4m3fn)
    one = torch.ones(())
    out = torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.bfloat16)  # what is timed
    torch.testing.assert_close(out.float(), x.float() @ w.float().t(), rtol=2e-2, atol=2e-2)
    assert float8_matmul_rate(CPU, 0.01, (16, 32, 48)) > 0


def test_rates_of_this_machine() -> None:
    start = time.perf_counter()
    assert 1e8 < matmul_rate(CPU, torch.float32, 0.01, (64, 64, 64)) < 1e14
    assert 1e8 < copy_rate(CPU, 0.01) < 1e13
    assert time.perf_counter() - start < 60


def reduce_here() -> tuple[float, float]:
    return all_reduce_rate(CPU, 0.01), time.perf_counter()


def test_a_sum_over_ranks(two_ranks: Ranks) -> None:
    rates_of_ranks = [rate for rate, _ in two_ranks(reduce_here)]
    assert all(1e6 < rate < 1e12 for rate in rates_of_ranks)
