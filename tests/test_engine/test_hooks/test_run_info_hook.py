"""What MMEngine's hooks find in the message hub."""

from pathlib import Path

import pytest

from internlm_mm.engine.hooks import EvaluationHook, RunInfoHook
from tests.helpers import tiny_runner


def test_outputs_on_the_interval_and_at_the_end(tmp_path: Path) -> None:
    changes = dict(default_hooks__run_info__interval=2, train_cfg__max_iters=5)
    runner = tiny_runner(tmp_path, [EvaluationHook()], **changes)
    runner.train()
    hub = runner.message_hub
    for key in ('loss', 'grad_norm', 'lr', 'num_tokens', 'time', 'tokens_per_second'):
        history, counts = hub.get_scalar(f'train/{key}').data
        assert len(history) <= 3 and counts.sum() == len(history)
    assert len(hub.get_scalar('train/loss').data[0]) == 3  # after 2, 4 and 5
    assert hub.get_info('iter') == 4 and hub.get_info('max_iters') == 5
    assert hub.get_scalar('val/loss').current() > 0
    assert hub.get_info('seed') == 1024


def test_wrong_interval() -> None:
    with pytest.raises(ValueError, match='RunInfoHook: interval=0'):
        RunInfoHook(interval=0)
