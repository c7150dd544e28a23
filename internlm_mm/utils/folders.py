"""Folders that will be written into."""

import tempfile
from pathlib import Path


def why_not_writable(folder: Path) -> str | None:
    """The system's reason why nothing can be written into a folder; None if it can.

    Args:
        folder: Nothing is left in it.
    """
    try:
        # A name of its own: ranks of several machines do this in one shared folder at once.
        with tempfile.NamedTemporaryFile(dir=folder, prefix='.write_test_'):
            return None
    except OSError as error:
        return error.strerror or str(error)
