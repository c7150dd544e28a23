"""NVIDIA's apex, which a user has built, or a message that says how."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BUILD = (
    "build NVIDIA's from a clone of https://github.com/NVIDIA/apex: "
    'APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation .'
)


def has_apex(part: str) -> bool | None:
    """Whether the package `apex`, which is not imported, has NVIDIA's `part`; None without one."""
    spec = find_spec('apex')
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    return any((folder / part).is_dir() for folder in folders)


def import_apex(part: str, wanted: str) -> Any:
    """A module of apex.

    Args:
        part: Of the package, as 'optimizers'.
        wanted: What of a config asks for it, for the message.

    Raises:
        ImportError: If apex is not there, is another package, or cannot be imported.
    """
    is_there = has_apex(part)
    if is_there is None:
        raise ImportError(
            f"{wanted} needs NVIDIA's apex, which is not installed; the package called apex on "
            f'PyPI is another one; {BUILD}'
        )
    if not is_there:
        raise ImportError(
            f'{wanted}: the package called apex that is installed has no apex.{part}; the one '
            f"called apex on PyPI is not NVIDIA's: pip uninstall -y apex, and {BUILD}"
        )
    try:
        return import_module(f'apex.{part}')
    except ImportError as error:
        raise ImportError(f'{wanted}: apex.{part} cannot be imported: {error}; {BUILD}') from error
