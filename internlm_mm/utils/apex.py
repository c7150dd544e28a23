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


def missing_apex(part: str) -> list[str]:
    """Why a module of apex cannot be imported here, as one predicate; empty if it can.

    Args:
        part: Of the package, as 'optimizers'.
    """
    is_there = has_apex(part)
    if is_there is None:
        return [
            "needs NVIDIA's apex, which is not installed; the package called apex on PyPI is "
            f'another one; {BUILD}'
        ]
    if not is_there:
        return [
            f"needs NVIDIA's apex: the package called apex that is installed has no apex.{part}; "
            f"the one called apex on PyPI is not NVIDIA's: pip uninstall -y apex, and {BUILD}"
        ]
    try:
        import_module(f'apex.{part}')
    except ImportError as error:
        return [f'needs apex.{part}, which cannot be imported: {error}; {BUILD}']
    return []


def import_apex(part: str, wanted: str) -> Any:
    """A module of apex.

    Args:
        part: Of the package, as 'optimizers'.
        wanted: What of a config asks for it, for the message.

    Raises:
        ImportError: If apex is not there, is another package, or cannot be imported.
    """
    if missing := missing_apex(part):
        raise ImportError(f'{wanted} {missing[0]}')
    return import_module(f'apex.{part}')
