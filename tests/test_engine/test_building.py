"""Hooks of a config, their order, and what is told of a run; loaders are built in test_loops.py."""

from pathlib import Path

import pytest

from tests.helpers import tiny_runner

CHECKPOINT = dict(type='StepCheckpointHook', interval=6)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'custom_hooks': [dict(type='StepCheckpointHok')]}, 'StepCheckpointHook'),
        ({'custom_hooks': [dict(type='StepCheckpointHook', intervall=3)]}, 'interval'),
        ({'default_hooks__progress__interval': 0}, 'interval=0'),
        ({'default_hooks__throughput__type': 'ThruputHook'}, 'ThroughputHook'),
    ],
)
def test_unknown_hooks_and_options(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError, KeyError), match=message):
        tiny_runner(tmp_path, **changes)


def test_a_role_can_be_dropped_or_given_to_another(tmp_path: Path) -> None:
    runner = tiny_runner(
        tmp_path, default_hooks__progress=None, default_hooks__checkpoint=CHECKPOINT
    )
    names = [type(hook).__name__ for hook in runner.hooks]
    assert 'ProgressHook' not in names
    assert names.count('StepCheckpointHook') == 1
    assert runner.get_hooks_info().split() == [part for n in names for part in (n, '->')][:-1]


def test_what_it_ran_on_is_kept(tmp_path: Path) -> None:
    runner = tiny_runner(tmp_path)
    text = (Path(runner.log_dir) / 'environment.txt').read_text()
    assert 'PyTorch: ' in text and 'seed: 1024' in text
