"""Folders that are there whole or not at all: made elsewhere, and renamed when finished."""

import os
import shutil
from itertools import count
from pathlib import Path


def publish(folder: Path, path: Path, aside: str = '.{}.replaced') -> None:
    """Give a finished folder its name; what was called so goes when the new one is in its place.

    Args:
        folder: Beside `path`, or elsewhere on the same file system.
        path: Its name from now on.
        aside: What an older one is called between the two renames; see `set_aside`.
    """
    sync_folder(folder)
    older = set_aside(path, aside) if path.exists() else None
    os.replace(folder, path)
    sync_folder(path.parent)
    if older is not None:
        shutil.rmtree(older)


def set_aside(path: Path, name: str) -> Path:
    """Rename a folder to where nobody looks.

    Args:
        path: The folder.
        name: The new name, with {} for the old one; a number follows where that exists.

    Returns:
        The new path.
    """
    names = (f'{name.format(path.name)}{number or ""}' for number in count())
    renamed = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    os.replace(path, renamed)
    return renamed


def sync_folder(path: Path) -> None:
    """Make renames and new names in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
