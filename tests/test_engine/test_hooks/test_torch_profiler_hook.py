"""Traces hold the steps that were asked for."""

import json
from pathlib import Path

import pytest
from mmengine.hooks import Hook

from internlm_mm.engine.hooks import TorchProfilerHook
from tests.helpers import tiny_runner


def steps_in(trace: Path) -> list[str]:
    events = json.loads(trace.read_text())['traceEvents']
    return sorted({e['name'] for e in events if e['name'].startswith('ProfilerStep#')})


def test_a_trace_of_the_active_steps(tmp_path: Path) -> None:
    hook = TorchProfilerHook(wait=1, warmup=1, active=2, folder='traces', memory=True)
    runner = tiny_runner(tmp_path, [hook])
    runner.train()
    (trace,) = tmp_path.glob('*/traces/rank0.json')
    assert steps_in(trace) == ['ProfilerStep#2', 'ProfilerStep#3']
    text = trace.read_text()
    assert 'aten::mm' in text and '[memory]' in text
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'profile of 2 steps in' in log and 'Self CPU' in log
    assert hook._profiler is None


def test_ranks_that_are_not_named_record_nothing(tmp_path: Path) -> None:
    hook = TorchProfilerHook(wait=0, warmup=0, active=1, ranks=(1, 2))
    tiny_runner(tmp_path, [hook], train_cfg__max_iters=1).train()
    assert not list(tmp_path.glob('*/profile'))


def test_a_failure_stops_the_profiler(tmp_path: Path) -> None:
    class Fail(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
            if batch_idx == 2:
                raise FloatingPointError('now')

    hook = TorchProfilerHook(wait=1, warmup=1, active=2)
    with pytest.raises(FloatingPointError):
        tiny_runner(tmp_path, [hook, Fail()]).train()
    assert hook._profiler is None
    # torch allows one profiler at a time: another can start.
    again = TorchProfilerHook(wait=0, warmup=1, active=1)
    tiny_runner(tmp_path / 'again', [again], train_cfg__max_iters=2).train()
    assert list(tmp_path.glob('again/*/profile/rank0.json'))


def test_more_steps_than_the_run_has(tmp_path: Path) -> None:
    runner = tiny_runner(tmp_path, [TorchProfilerHook(wait=5, warmup=1, active=2)])
    with pytest.raises(ValueError, match=r'wait=5 .* are 8 steps, but the run has only 6'):
        runner.train()


@pytest.mark.parametrize(('option', 'value'), [('wait', -1), ('warmup', -1), ('active', 0)])
def test_wrong_options(option: str, value: int) -> None:
    with pytest.raises(ValueError, match=f'TorchProfilerHook: {option}={value}'):
        TorchProfilerHook(**{option: value})
