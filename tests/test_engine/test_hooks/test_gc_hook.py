"""Garbage collection on the interval only, and Python's own before and after."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
from mmengine.hooks import Hook

from internlm_mm.engine.hooks import GarbageCollectionHook
from tests.helpers import tiny_runner


class Cycle:
    def __init__(self) -> None:
        self.itself = self


class LeaveGarbage(Hook):
    """Leaves a cycle before the first step, and notes after each whether it is still there."""

    priority = 'VERY_HIGH'

    def __init__(self, fail_at: int | None = None) -> None:
        self.alive: list[bool] = []
        self.fail_at = fail_at

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        assert not gc.isenabled()
        if batch_idx == self.fail_at:
            raise FloatingPointError('now')
        if batch_idx == 0:
            self.cycle = weakref.ref(Cycle())
        self.alive.append(self.cycle() is not None)


@pytest.fixture(autouse=True)
def _nothing_frozen() -> Iterator[None]:
    """As in a program: our tests freeze what they have imported."""
    gc.unfreeze()
    yield
    gc.freeze()


def test_collects_on_the_interval_alone(tmp_path: Path) -> None:
    watch = LeaveGarbage()
    runner = tiny_runner(tmp_path, [watch], default_hooks__gc__interval=3)
    assert gc.isenabled()
    runner.train()
    assert watch.alive == [True, True, True, False, False, False]
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_python_collects_again_after_a_failure(tmp_path: Path) -> None:
    runner = tiny_runner(tmp_path, [LeaveGarbage(fail_at=2)])
    with pytest.raises(FloatingPointError):
        runner.train()
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_a_collector_that_was_off_stays_off() -> None:
    hook = GarbageCollectionHook()
    gc.disable()
    try:
        hook.before_train(None)
        hook.after_train(None)
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize('frozen_before', [True, False])
def test_what_others_froze_stays_frozen(frozen_before: bool) -> None:
    hook = GarbageCollectionHook()
    if frozen_before:
        gc.freeze()
    hook.before_train(None)
    assert gc.get_freeze_count() > 0
    hook.after_train(None)
    assert (gc.get_freeze_count() > 0) == frozen_before


def test_wrong_interval() -> None:
    with pytest.raises(ValueError, match='GarbageCollectionHook: interval=0'):
        GarbageCollectionHook(interval=0)
