"""Which frozen weights a checkpoint of adapters belongs to, and whether they are still the same."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from internlm_mm.checkpoint.disk import files_crc32
from internlm_mm.checkpoint.step_folders import MANIFEST_FILE, find_checkpoint, read_state

LOG = logging.getLogger(__name__)

_WEIGHTS = ('*.safetensors', '*.bin', 'model_*.pt')  # InternLM's shards of optimizers are *.pt too
_WHOLE = 'crc32:'  # how fingerprints begin that have seen all of the files

_PIECE = 1 << 16  # bytes at either end of a file that fingerprints of old looked at
_WEIGHTS_OF_OLD = ('*.safetensors', '*.bin', '*.pt')


class Base(NamedTuple):
    """Frozen weights.

    Attributes:
        path: A checkpoint, or a folder of another program.
        options: Of `open_source`, where it is of another program.
        fingerprint: See `fingerprint`.
    """

    path: Path
    options: Mapping[str, Any]
    fingerprint: str

    def as_json(self) -> dict[str, Any]:
        """For `state.json`."""
        return {
            'path': str(self.path),
            'options': dict(self.options),
            'fingerprint': self.fingerprint,
        }


def describe_base(path: str | Path, options: Mapping[str, Any] | None = None) -> Base:
    """Frozen weights as a checkpoint of adapters names them."""
    path = Path(path).absolute()
    return Base(path, dict(options or {}), fingerprint(path))


def fingerprint(path: str | Path) -> str:
    """A hash that copies of the same weights share, wherever they lie.

    Of a checkpoint it is that of the manifest, which has checksums of all files. Of other folders
    the files of weights are read, every byte of them: two merges of adapters into one base differ
    in nothing but numbers in the middle of files. It finds changes, and is no proof against who
    means to forge one.
    """
    path = Path(path)
    if (path / MANIFEST_FILE).is_file():
        return _of_manifest(path)
    files = _files(path, _WEIGHTS)
    digest = hashlib.sha256()
    for file, checksum in zip(files, files_crc32(files), strict=True):
        digest.update(f'{file.name} {file.stat().st_size} {checksum}\n'.encode())
    return f'{_WHOLE}{digest.hexdigest()[:32]}'


def sees_all(base: Base) -> bool:
    """Whether a fingerprint has seen all bytes of the weights, as those of old have not."""
    return base.fingerprint.startswith(_WHOLE) or (base.path / MANIFEST_FILE).is_file()


def _of_manifest(path: Path) -> str:
    return hashlib.sha256((path / MANIFEST_FILE).read_bytes()).hexdigest()[:32]


def _fingerprint_of_old(path: Path) -> str:
    """Of a folder of another program: sizes and both ends of its files, as once was taken."""
    digest = hashlib.sha256()
    for file in _files(path, _WEIGHTS_OF_OLD):
        size = file.stat().st_size
        digest.update(f'{file.name} {size}\n'.encode())
        with open(file, 'rb') as opened:
            digest.update(opened.read(_PIECE))
            opened.seek(max(0, size - _PIECE))
            digest.update(opened.read(_PIECE))
    return digest.hexdigest()[:32]


def _files(path: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({file for pattern in patterns for file in path.glob(pattern)})


def recorded_base(checkpoint: str | Path) -> Base | None:
    """What a checkpoint says of its frozen weights; None where it holds them itself."""
    said = read_state(checkpoint).get('base')
    return said and Base(Path(said['path']), said['options'], said['fingerprint'])


def find_base(
    checkpoint: str | Path, instead: str | Path | None = None, key: str = 'base'
) -> Base | None:
    """The frozen weights that a checkpoint of adapters belongs to, where they are now.

    Args:
        checkpoint: Its folder.
        instead: Where else to look; a work dir means its newest checkpoint.
        key: What `instead` is called, for messages.

    Returns:
        None where the checkpoint holds all weights itself.

    Raises:
        FileNotFoundError: If they are not there.
        ValueError: If others are there.
    """
    said = recorded_base(checkpoint)
    if said is None:
        return None
    path = said.path if instead is None else Path(instead).absolute()
    if not path.is_dir():
        raise FileNotFoundError(
            f'{checkpoint} holds adapters of the weights in {said.path}; {path} is no folder: say '
            f'with {key} where they are now'
        )
    if instead is not None and not said.options and any(path.glob('iter_*')):
        path = find_checkpoint(path)
    whole = sees_all(said._replace(path=path))
    found = fingerprint(path) if whole else _fingerprint_of_old(path)
    if found != said.fingerprint:
        raise ValueError(
            f'{checkpoint} holds adapters of other weights than those in {path}: its base was '
            f'{said.path}, whose fingerprint {said.fingerprint} differs'
        )
    if not whole:
        LOG.warning(
            f'{checkpoint} is of a version that looked at both ends of the files of its base alone:'
            f' whether the weights in {path} are the same ones in the middle is not known'
        )
    return said._replace(path=path)
