"""Runs small enough for a test."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook

from internlm_mm.engine import LLMRunner
from internlm_mm.utils.config import check_config, load_config

TINY = Path(__file__).parent / 'configs' / 'tiny.py'


def tiny_config(work_dir: Path, **changes: Any) -> Config:
    """The config of `tests/configs/tiny.py`, checked.

    Args:
        work_dir: Where the run writes.
        changes: Overrides by key with `__` for the dot: `train_cfg__max_iters=3`.
    """
    options = {key.replace('__', '.'): value for key, value in changes.items()}
    config = load_config(TINY, options)
    config.work_dir = str(work_dir)
    check_config(config)
    return config


def tiny_runner(work_dir: Path, hooks: Sequence[Hook] = (), **changes: Any) -> LLMRunner:
    """A runner of `tiny_config`, not yet trained, with further hooks that are built already."""
    runner = LLMRunner.from_cfg(tiny_config(work_dir, **changes))
    for hook in hooks:
        runner.register_hook(hook)
    return runner
