import pytest

from internlm_mm.sandbox import Sandbox, SandboxError
from internlm_mm.sandbox.benchmark import load, measure


def test_figures() -> None:
    try:
        ready, cold = Sandbox(spare=1), Sandbox(spare=0)
    except SandboxError as error:
        pytest.skip(str(error))
    with ready, cold:
        timings = measure(ready, cold, starts=1, cells=20)
    assert [one.count for one in timings] == [1, 1, 20, 20]
    for one in timings:
        assert 0 < one.median <= one.high and 0 < one.processor
    _, nothing, cell, _ = timings
    assert cell.median < nothing.median and cell.processor < nothing.processor
    assert 'load average' in load()
