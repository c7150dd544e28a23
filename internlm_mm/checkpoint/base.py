"""Which frozen weights a checkpoint of adapters belongs to, and whether they are still the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from internlm_mm.checkpoint.step_folders import MANIFEST_FILE, find_checkpoint, read_state

_PIECE = 1 << 16  # bytes at either end of a file that are looked at
_WEIGHTS = ('*.safetensors', '*.bin', '*.pt')


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
    sizes and both ends of the files of weights are looked at, not all of the many gigabytes.
    """
    path = Path(path)
    digest = hashlib.sha256()
    if (path / MANIFEST_FILE).is_file():
        digest.update((path / MANIFEST_FILE).read_bytes())
        return digest.hexdigest()[:32]
    for file in sorted({file for pattern in _WEIGHTS for file in path.glob(pattern)}):
        size = file.stat().st_size
        digest.update(f'{file.name} {size}\n'.encode())
        with open(file, 'rb') as opened:
            digest.update(opened.read(_PIECE))
            opened.seek(max(0, size - _PIECE))
            digest.update(opened.read(_PIECE))
    return digest.hexdigest()[:32]


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
    if fingerprint(path) != said.fingerprint:
        raise ValueError(
            f'{checkpoint} holds adapters of other weights than those in {path}: its base was '
            f'{said.path}, whose fingerprint {said.fingerprint} differs'
        )
    return said._replace(path=path)
