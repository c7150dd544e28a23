"""Published checkpoints: which there are, whether they are whole, and what they hold.

The files of one are described in `internlm_mm.checkpoint.checkpointer`.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internlm_mm.checkpoint.disk import files_crc32
from internlm_mm.checkpoint.storage import METADATA_FILE, StoredTensors, read_tensor_index
from internlm_mm.utils.adapters import is_adapter, is_score, names_held
from internlm_mm.utils.suggest import did_you_mean, nearest_path

STATE_FILE = 'state.json'
MANIFEST_FILE = 'manifest.json'
CONFIG_FILE = 'config.json'
TOKENIZER_FOLDER = 'tokenizer'
LOG = logging.getLogger(__name__)
_STEP_FOLDER = re.compile(r'iter_(\d+)')


def find_checkpoint(path: str | os.PathLike) -> Path:
    """The checkpoint meant by a path: itself, or the newest whole one of a work dir.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If `path` is a checkpoint that lacks files or parts of them.
    """
    path = Path(path)
    named = _STEP_FOLDER.fullmatch(path.name) is not None and path.is_dir()
    if named or (path / METADATA_FILE).is_file():
        check_whole(path, checksums=False)
        return path
    if not path.is_dir():
        what = 'is no folder' if path.exists() else 'does not exist'
        raise FileNotFoundError(
            f'{path} {what}: expected a checkpoint iter_N or a work dir{nearest_path(path)}'
        )
    newest, damaged = newest_whole_checkpoint(path)
    for folder, why in damaged.items():
        LOG.warning(f'{folder} is passed over: {why}')
    if newest is None:
        if any(path.glob('*.safetensors')):
            raise FileNotFoundError(
                f'{path} is a Hugging Face folder: load_from, tools/test.py and tools/chat.py '
                'read it, tools/convert_from.py converts; expected a checkpoint iter_N or a work '
                'dir'
            )
        reasons = ''.join(f'\n  {folder.name}: {why}' for folder, why in damaged.items())
        raise FileNotFoundError(f'{path} holds no whole checkpoint iter_N{reasons}')
    return newest


def list_checkpoints(work_dir: str | os.PathLike) -> list[Path]:
    """All published checkpoints of a work dir, oldest first, whole or not."""
    found = [
        (int(match[1]), folder)
        for folder in Path(work_dir).glob('iter_*')
        if (match := _STEP_FOLDER.fullmatch(folder.name))
    ]
    return [folder for _, folder in sorted(found)]


def newest_whole_checkpoint(work_dir: str | os.PathLike) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that passes `verify`, and why newer ones do not."""
    damaged: dict[Path, str] = {}
    for folder in reversed(list_checkpoints(work_dir)):
        problems = verify(folder)
        if not problems:
            return folder, damaged
        damaged[folder] = problems[0]
    return None, damaged


def verify(path: str | os.PathLike, checksums: bool = True) -> list[str]:
    """What is wrong with a checkpoint; nothing if the list is empty.

    Args:
        path: Checkpoint folder.
        checksums: Whether to read the files, too, rather than only compare their sizes.
    """
    path = Path(path)
    try:
        files = json.loads((path / MANIFEST_FILE).read_text())['files']
        manifest = {name: (entry['size'], entry['crc32']) for name, entry in files.items()}
    except FileNotFoundError:
        return [f'{MANIFEST_FILE} is missing']
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f'{MANIFEST_FILE} is damaged']
    problems = []
    readable = []
    for name, (size, _) in manifest.items():
        file = path / name
        if not file.is_file():
            problems.append(f'{name} is missing')
        elif file.stat().st_size != size:
            problems.append(f'{name} has {file.stat().st_size} bytes instead of {size}')
        else:
            readable.append(name)
    if checksums:
        sums = files_crc32([path / name for name in readable])
        problems += [
            f'{name} is damaged: its checksum differs'
            for name, checksum in zip(readable, sums, strict=True)
            if checksum != manifest[name][1]
        ]
    return problems


def check_whole(path: str | os.PathLike, checksums: bool = True) -> None:
    """Refuse a damaged checkpoint; see `verify`.

    Raises:
        ValueError: Naming the first thing that is wrong.
    """
    problems = verify(path, checksums)
    if problems:
        more = f' (and {len(problems) - 1} more)' if len(problems) > 1 else ''
        raise ValueError(f'{path} is not a whole checkpoint: {problems[0]}{more}')


def check_tensors(path: Path, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Compare names and shapes before anything is read.

    Raises:
        ValueError: Naming the first tensor that does not fit.
    """
    stored = read_tensor_index(path)
    for name, shape in wanted.items():
        if name not in stored:
            hint = did_you_mean(name, stored) if len(stored) < 5000 else ''
            if name.endswith('lm_head.weight') and any(map(is_score, stored)):
                hint = ' It is a reward model, whose head gave way to a score'
            raise ValueError(f'{path} is a checkpoint of another model: it has no {name!r}.{hint}')
        if tuple(stored[name]['shape']) != tuple(shape):
            raise ValueError(
                f'{path} is a checkpoint of another model: {name!r} has shape '
                f'{stored[name]["shape"]} there and {list(shape)} here'
            )


def check_model(path: Path, model: Any) -> None:
    """Compare a whole model with a checkpoint, both ways: a smaller model would lose layers unseen.

    Of a model with adapters a checkpoint may hold the adapters alone, or all but them; one for a
    reward model may have a head in the place of the score.

    Args:
        path: Checkpoint folder.
        model: May be on the meta device.

    Raises:
        ValueError: Naming the first tensor that does not fit.
    """
    wanted = {f'model.{name}': tuple(value.shape) for name, value in model.state_dict().items()}
    stored = [name for name in read_tensor_index(path) if name.startswith('model.')]
    held = names_held(wanted, stored)
    if any(map(is_adapter, stored)) and not any(map(is_adapter, wanted)):
        raise ValueError(
            f'{path} holds adapters, and this model has none: set model.adapter as it is in its '
            'config.py, or merge them first (tools/convert2hf.py)'
        )
    has_score = any(map(is_score, wanted))
    wanted = {name: wanted[name] for name in held}
    check_tensors(path, wanted)
    for name in stored:
        if name not in wanted and not (has_score and name == 'model.lm_head.weight'):
            raise ValueError(
                f'{path} is a checkpoint of another model: it holds {name!r}, '
                'which this model does not have'
            )


def read_state(path: str | os.PathLike) -> dict[str, Any]:
    """Content of `state.json`."""
    return json.loads((Path(path) / STATE_FILE).read_text())


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """The configuration a checkpoint was trained with; types are dotted names."""
    return json.loads((find_checkpoint(path) / CONFIG_FILE).read_text())


def read_model_state(path: str | os.PathLike) -> StoredTensors:
    """The model's weights by name, each read when asked for. Needs no process group."""
    return StoredTensors(find_checkpoint(path), prefix='model.')


def step_of(path: Path) -> int:
    """N of `iter_N`."""
    match = _STEP_FOLDER.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])
