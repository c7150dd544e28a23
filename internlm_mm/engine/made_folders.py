"""Folders that a start makes, and takes back if it fails before its first step."""

import os
import shutil
from contextlib import suppress
from pathlib import Path


class MadeFolders:
    """What a run is about to make; to be asked before it is built.

    Args:
        work_dir: The run's.
    """

    def __init__(self, work_dir: str | os.PathLike) -> None:
        path = Path(work_dir).absolute()
        self._missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        self._there = set(path.iterdir()) if path.is_dir() else set()

    def take_back(self, log_dir: str | os.PathLike | None) -> None:
        """Remove the run's log folder, and the work dir and those around it where they are empty.

        What was there before stays, and so does whatever something else has put there since.

        Args:
            log_dir: Of the run; None where it has none yet.
        """
        if log_dir is not None and Path(log_dir).absolute() not in self._there:
            shutil.rmtree(log_dir, ignore_errors=True)
        for folder in self._missing:  # from the inside out
            with suppress(OSError):  # not empty, or not made
                folder.rmdir()
