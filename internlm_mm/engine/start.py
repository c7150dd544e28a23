"""Where a run begins: from nothing, from a checkpoint's weights, or where the last run stopped."""

import contextlib
import json
from collections.abc import Callable, Mapping
from logging import Logger
from pathlib import Path
from typing import Any

import torch.distributed as dist
from mmengine.config import Config

from internlm_mm.checkpoint.foreign import (
    NEITHER,
    Source,
    check_same_model,
    folder_inside,
    is_foreign,
    open_source,
)
from internlm_mm.checkpoint.peft_config import read_peft_config
from internlm_mm.checkpoint.peft_files import adapter_of_peft, check_peft
from internlm_mm.checkpoint.pretrained import check_family
from internlm_mm.checkpoint.step_folders import (
    TOKENIZER_FOLDER,
    check_model,
    check_whole,
    find_checkpoint,
    list_checkpoints,
    newest_whole_checkpoint,
    read_config,
)
from internlm_mm.checkpoint.storage import METADATA_FILE, read_tensor_index
from internlm_mm.checkpoint.vocabulary import compare_vocabularies, find_tokenizer
from internlm_mm.engine.load_from import ADAPTERS, CONTENT, Start, parse_load_from, with_base
from internlm_mm.utils.config import dump_config, to_plain
from internlm_mm.utils.suggest import nearest_path


def adopt_model(config: Config) -> None:
    """Where a config names no class of model, take the one that `load_from` holds.

    What the config does say of its model wins: `model = dict(max_seq_len=8192)`.

    Args:
        config: Changed in place; not yet checked.

    Raises:
        FileNotFoundError: If there is nothing at `load_from`.
        ValueError: If it is damaged, or `load_from` has unknown parts.
    """
    said = dict.get(config._cfg_dict, 'model') or {}  # as it is: nothing is imported for its type
    load_from = config.get('load_from')
    if load_from is None or not isinstance(said, dict) or 'type' in said:
        return
    path, _, options = parse_load_from(load_from)
    _, adapter = (options.pop(key, None) for key in ADAPTERS)
    if not options and not is_foreign(path):
        _check_there(path)
        model = _config_of(path)['model']
        check_family(model.get('type'))
    else:
        model = open_source(path, **options).config
    model = {key: value for key, value in model.items() if key != 'objective'}
    if adapter is not None:
        model['adapter'] = adapter_of_peft(adapter, {**model, **said}.get('num_layers'))
    config.model = to_plain({**model, **said})  # classes by name, as in a dump


def _config_of(path: str) -> dict[str, Any]:
    """Of the newest checkpoint whose sizes are right; every rank reads it, so no checksums."""
    for folder in reversed(list_checkpoints(path)):
        with contextlib.suppress(OSError, ValueError):
            return read_config(folder)
    return read_config(path)


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
        start = Start(resumed, CONTENT if training else ('model',), training)
        return agree(lambda: with_base(start, load_from))
    if load_from is None:
        return None
    path, content, options = parse_load_from(load_from)
    _, adapter = (options.pop(key, None) for key in ADAPTERS)

    def decide() -> Start:
        start = with_base(_find_weights(path, content, options), load_from)
        if adapter is None:
            return start
        read_peft_config(adapter)  # or an error
        return start._replace(adapter=Path(adapter))

    return agree(decide)


def _find_weights(path: str, content: tuple[str, ...], options: dict[str, Any]) -> Start:
    is_ours = (Path(path) / METADATA_FILE).is_file() or bool(list_checkpoints(path))
    if options and is_ours:
        raise ValueError(
            f'load_from.{next(iter(options))} is for weights of other programs; {path} is a '
            'checkpoint'
        )
    if not options and not is_foreign(path):
        _check_there(path)
        return Start(_whole_checkpoint(path), content, False)
    if content != ('model',):
        other = next((part for part in content if part != 'model'), 'nothing')
        raise ValueError(
            f"load_from.content: {path} holds weights of another program, ['model'] alone and not "
            f'{other!r}'
        )
    return Start(Path(path), content, False, options)


def _check_there(path: str) -> None:
    """Whether `load_from` names a checkpoint or a work dir, where it names nothing else."""
    folder = Path(path)
    is_step = (folder / METADATA_FILE).is_file() or folder in list_checkpoints(folder.parent)
    if folder.is_dir() and not (is_step or list_checkpoints(folder)):
        raise FileNotFoundError(
            f'load_from: {path} holds no checkpoint iter_N, and {NEITHER}{folder_inside(folder)}'
        )
    if not folder.is_dir():
        what = 'is no folder' if folder.exists() else 'does not exist'
        raise FileNotFoundError(
            f'load_from: {path} {what}; expected a work dir, a checkpoint iter_N, a '
            "Hugging Face folder or one of InternLM's shards. Nothing is downloaded"
            f'{nearest_path(path)}'
        )


def check_start(start: Start, model: Any, config: Config, logger: Logger) -> Source | None:
    """Whether the run's model is the one whose weights it would take. Collective.

    Args:
        start: One of the `chain` of what `choose_start` chose.
        model: The run's, whole; may be on the meta device.
        config: The run's.
        logger: Hears of differences that do not hinder.

    Returns:
        The weights, opened, where they are of another program.

    Raises:
        ValueError: Naming the file, the tensor or the key of the model that does not fit.
    """
    adapter = start.adapter
    if adapter is not None:
        said = to_plain(dict.get(config._cfg_dict, 'model') or {}).get('adapter')
        together(lambda: check_peft(adapter, model, said))
    if start.foreign is not None:
        source, differences = together(lambda: _open(start, model))
        for difference in differences:
            logger.warning(f'{difference}; positions in long texts may mean something else')
        agree(source.weights.check_files)  # one pass over the files, on one rank
        return source
    if {'model', 'optimizer'} & set(start.content):
        check_model(start.path, model)
        if 'optimizer' in start.content:
            _check_trained(start.path, model)
        for key, ours, theirs in model_differences(start.path, config):
            logger.warning(
                f'model.{key}={ours!r} differs from {theirs!r}, with which {start.path} '
                'was trained: weights of the same shapes may mean something else'
            )
    return None


def _check_trained(path: Path, model: Any) -> None:
    """Refuse to go on with an optimizer that has not seen all of what is trained here."""
    stored = read_tensor_index(path)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and f'model.{name}' not in stored:
            raise ValueError(
                f'{path} was trained without {name!r}, which this run trains: it cannot go on '
                f'there. A new run begins with its weights: load_from={path}'
            )


def _open(start: Start, model: Any) -> tuple[Source, list[str]]:
    source = open_source(start.path, **(start.foreign or {}))
    return source, check_same_model(model, source)


def check_start_vocabulary(
    start: Start, tokenizer: Any, loaders: Mapping[str, Any], logger: Logger
) -> None:
    """Whether the run's ids mean what they meant to the weights that it begins from. Collective.

    Args:
        start: What `choose_start` chose.
        tokenizer: The run's, or None.
        loaders: Built loaders by config key.
        logger: Hears of differences that need not hinder.

    Raises:
        ValueError: If the tokenizer beside the weights gives the same words other ids.
    """
    if start.random or 'model' not in start.content:
        return
    folder = start.path if start.foreign is not None else start.path / TOKENIZER_FOLDER
    data = {key: loader.dataset for key, loader in loaders.items()}

    def compare() -> list[str]:
        try:
            theirs = find_tokenizer(folder)
        except (OSError, ValueError) as error:
            return [f'the tokenizer in {folder} is not compared with that of the data: {error}']
        return [] if theirs is None else compare_vocabularies(tokenizer, data, theirs, folder)

    for difference in agree(compare):
        logger.warning(difference)


def agree(decide: Callable[[], Any]) -> Any:
    """What rank 0 decides, on every rank; an error there is raised everywhere. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return decide()
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [decide()]
        except Exception as error:
            answer = [error]
    dist.broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def together(act: Callable[[], Any]) -> Any:
    """What each rank gets by itself; an error on one is raised on all. Collective.

    Raises:
        ValueError: On the ranks that had no error, with the first one's rank and message.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return act()
    result, failure = None, None
    try:
        result = act()
    except Exception as error:
        failure = error
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure and f'{type(failure).__name__}: {failure}')
    if failure is not None:
        raise failure
    for rank, message in enumerate(failures):
        if message is not None:
            raise ValueError(f'rank {rank}: {message}')
    return result


def _find_resume(resume: str | bool, work_dir: Path, logger: Logger) -> Path | None:
    if isinstance(resume, str):
        if is_foreign(resume):
            raise ValueError(
                f'resume={resume!r} holds weights of another program and no run to go on with: '
                'use load_from'
            )
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
    away = ['objective'] if 'adapter' in theirs else ['objective', 'adapter']
    keys = [key for key in {**theirs, **ours} if key not in away]
    return [
        (key, ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)
    ]
