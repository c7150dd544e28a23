"""When evaluations happen."""

import math
from pathlib import Path

import pytest
from mmengine.hooks import Hook

from internlm_mm.engine.hooks import EvaluationHook
from tests.helpers import tiny_runner


def test_both_ends_and_the_interval(tmp_path: Path) -> None:
    hook = EvaluationHook(interval=2, at_start=True)
    tiny_runner(tmp_path, [hook], train_cfg__max_iters=5).train()
    assert list(hook.history) == [0, 2, 4, 5]
    for metrics in hook.history.values():
        assert metrics['perplexity'] == pytest.approx(math.exp(metrics['loss']), rel=1e-12)
    # Untrained on 64 tokens drawn uniformly: about as good as guessing.
    assert hook.history[0]['loss'] == pytest.approx(math.log(64), rel=0.05)


def test_the_end_is_evaluated_once(tmp_path: Path) -> None:
    hook = EvaluationHook(interval=3)
    tiny_runner(tmp_path, [hook]).train()
    assert list(hook.history) == [3, 6]


def test_evaluating_changes_nothing(tmp_path: Path) -> None:
    weights = []
    for hooks in ([], [EvaluationHook(interval=1, at_start=True)]):
        runner = tiny_runner(tmp_path / str(len(hooks)), hooks)
        runner.train()
        assert runner.model.training
        weights.append(runner.model.norm.weight.tolist())
    assert weights[0] == weights[1]


def test_no_baseline_after_a_resume(tmp_path: Path) -> None:
    checkpoint = dict(type='StepCheckpointHook')
    tiny_runner(tmp_path, default_hooks__checkpoint=checkpoint, train_cfg__max_iters=3).train()
    hook = EvaluationHook(at_start=True)
    tiny_runner(tmp_path, [hook], resume=True).train()
    assert list(hook.history) == [6]


def test_a_signal_leaves_no_time_for_the_last(tmp_path: Path) -> None:
    class Signal(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
            runner.train_loop.stop_training = runner.train_loop.stopped_by_signal = True

    hook = EvaluationHook()
    tiny_runner(tmp_path, [hook, Signal()]).train()
    assert hook.history == {}


def test_no_data_to_evaluate_on(tmp_path: Path) -> None:
    runner = tiny_runner(tmp_path, [EvaluationHook()], val_dataloader=None, val_cfg=None)
    with pytest.raises(ValueError, match='EvaluationHook needs val_dataloader and val_cfg'):
        runner.train()


def test_wrong_interval() -> None:
    with pytest.raises(ValueError, match='EvaluationHook: interval=0'):
        EvaluationHook(interval=0)
