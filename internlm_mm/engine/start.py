"""Where a run begins: from nothing, from a checkpoint's weights, or where the last run stopped."""

import json
from collections.abc import Callable, Mapping
from logging import Logger
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from mmengine.config import Config

from internlm_mm.checkpoint.checkpointer import (
    check_whole,
    find_checkpoint,
    newest_whole_checkpoint,
    read_config,
)
from internlm_mm.utils.config import dump_config
from internlm_mm.utils.suggest import did_you_mean

CONTENT = ('model', 'optimizer', 'data', 'scheduler')
"""What `load_from=dict(path=..., content=[...])` can take from a checkpoint."""


class Start(NamedTuple):
    """A checkpoint to begin from.

    Attributes:
        path: Its folder.
        content: What to take from it; names of `CONTENT`.
        random: Whether random generators go on where they were.
    """

    path: Path
    content: tuple[str, ...]
    random: bool


def choose_start(
    resume: str | bool,
    load_from: str | Mapping[str, Any] | None,
    work_dir: Path,
    training: bool,
    logger: Logger,
) -> Start | None:
    """Decide what to begin from. Resuming wins if there is something to resume. Collective.

    Args:
        resume: See `LLMRunner`.
        load_from: See `LLMRunner`.
        work_dir: Where True looks for the newest whole checkpoint.
        training: Whether to train; an evaluation takes the weights alone.
        logger: Hears of checkpoints that are passed by.

    Returns:
        None to begin from nothing.

    Raises:
        FileNotFoundError: If a path that was named is not there.
        ValueError: If what was named is not whole, or `load_from` has unknown parts.
    """
    resumed = agree(lambda: _find_resume(resume, work_dir, logger))
    if resumed is not None:
        return Start(resumed, CONTENT if training else ('model',), training)
    if load_from is None:
        return None
    path, content = parse_load_from(load_from)
    return Start(agree(lambda: _whole_checkpoint(path)), content, False)


def agree(decide: Callable[[], Any]) -> Any:
    """What rank 0 decides, on every rank; an error there is raised everywhere. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return decide()
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [decide()]
        except (OSError, ValueError) as error:
            answer = [error]
    dist.broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def parse_load_from(load_from: str | Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Path and content of the key `load_from`; a path alone means the weights.

    Raises:
        ValueError: If a key or a part is unknown.
    """
    if isinstance(load_from, str):
        return load_from, ('model',)
    options = dict(load_from)
    path = options.pop('path', None)
    content = tuple(options.pop('content', ('model',)))
    if path is None or options:
        raise ValueError(f'load_from={dict(load_from)}: expected dict(path=..., content=[...])')
    for part in content:
        if part not in CONTENT:
            raise ValueError(
                f'load_from.content: {part!r} is unknown.{did_you_mean(part, CONTENT)}'
            )
    return path, content


def _find_resume(resume: str | bool, work_dir: Path, logger: Logger) -> Path | None:
    if isinstance(resume, str):
        return _whole_checkpoint(resume)
    if not resume:
        return None
    newest, damaged = newest_whole_checkpoint(work_dir)
    for folder, why in damaged.items():
        logger.warning(f'{folder} is not whole ({why}); looking for an older one')
    if newest is None:
        logger.info(f'nothing to resume in {work_dir}: starting from the beginning')
    return newest


def _whole_checkpoint(path: str) -> Path:
    folder = find_checkpoint(path)  # of a work dir, the newest that it has verified
    if folder == Path(path):
        check_whole(folder)
    return folder


def model_differences(path: Path, config: Config) -> list[tuple[str, Any, Any]]:
    """Keys of the model that a checkpoint was trained with otherwise, though its shapes fit.

    Args:
        path: The checkpoint.
        config: This run's.

    Returns:
        Key, value now and value then; the objective is left out, since it may change.
    """
    ours = json.loads(dump_config(config)[1]).get('model', {}) if config else {}
    theirs = read_config(path).get('model', {})
    if not ours:
        return []
    keys = [key for key in {**theirs, **ours} if key != 'objective']
    return [
        (key, ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)
    ]
