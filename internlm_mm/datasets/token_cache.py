"""Token files that are made when they are first asked for, by one process for all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.logging import print_log

from internlm_mm.utils.publish import publish

SOURCE_NAME = 'source.json'


def cached_folder(
    cache_dir: str | Path, source: Mapping[str, Any], make: Callable[[Path], None]
) -> Path:
    """The folder that `make` fills, made once for every `source`.

    Of the processes that share `cache_dir` one makes it and the others wait. It appears when it
    is whole.

    Args:
        cache_dir: Holds such folders.
        source: All that decides what is made, as JSON; written down in the folder.
        make: Fills the folder that it is given.

    Returns:
        The folder; it must not be changed.

    Raises:
        NotADirectoryError: If a file is in the place of `cache_dir` or of a folder above it.
    """
    folder, text = folder_of(cache_dir, source), _text(source)
    if folder.is_dir():
        return folder
    key = folder.name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f'cache_dir={str(cache_dir)!r} is no folder and cannot be made one'
        ) from error
    with _alone(folder.parent / f'.{key}.lock'):
        if folder.is_dir():  # made by another while this one waited
            return folder
        made = Path(tempfile.mkdtemp(prefix=f'.{key}.', suffix='.partial', dir=folder.parent))
        made.chmod(0o755)
        try:
            make(made)
            (made / SOURCE_NAME).write_text(text + '\n', encoding='utf-8')
            publish(made, folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return folder


def folder_of(cache_dir: str | Path, source: Mapping[str, Any]) -> Path:
    """Where `cached_folder` makes its folder, whether it is there or not."""
    return Path(cache_dir) / hashlib.sha256(_text(source).encode()).hexdigest()[:20]


def _text(source: Mapping[str, Any]) -> str:
    return json.dumps(source, indent=2, sort_keys=True, ensure_ascii=False)


def hash_contents(files: Iterable[Path]) -> dict[str, str]:
    """sha256 of files by their names as given, in hexadecimal."""
    hashes = {}
    for path in files:
        with open(path, 'rb') as file:
            hashes[str(path)] = hashlib.file_digest(file, 'sha256').hexdigest()
    return hashes


def hash_in_order(files: Iterable[Path]) -> list[list[str]]:
    """Name and sha256 of each file, in their order, wherever they are and however that is spelt."""
    return [[Path(path).name, found] for path, found in hash_contents(files).items()]


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, whatever happens to it."""
    with open(path, 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # some file systems of clusters have no locks
            print_log(
                f'{path}: cannot be locked ({error.strerror}): each process tokenises for itself',
                logger='current',
                level=logging.WARNING,
            )
        yield
