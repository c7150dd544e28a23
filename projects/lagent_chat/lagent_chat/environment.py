"""Lagent's own environment: where it is, and how it is made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
FOLDER = PROJECT / '.venv'
LAGENT = 'lagent==0.5.0rc3'
LINKS = 'zz_internlm_mm.pth'
"""File by which the environment sees the packages of the one that made it."""

REQUIREMENTS = PROJECT / 'requirements.txt'
CONSTRAINTS = PROJECT.parents[1] / 'requirements' / 'constraints.txt'

_CHECK = (
    'import internlm_mm, lagent.actions, lagent.agents, lagent.hooks, lagent.llms; '
    'import importlib.metadata as m; print(m.version("lagent"))'
)


class LagentMissing(Exception):
    """The environment is missing or broken, and what to do."""


def python_of(folder: Path) -> Path:
    """The interpreter of an environment."""
    return folder / 'bin' / 'python'


def command_of(folder: Path) -> str:
    """What makes an environment."""
    where = '' if folder == FOLDER else f' --env {folder}'
    return f'python {Path(sys.argv[0]).with_name("setup_env.py")}{where}'


def find(folder: Path) -> Path:
    """The interpreter that has Lagent, and sees what this one has.

    Raises:
        LagentMissing: If there is none.
    """
    if not python_of(folder).exists():
        raise LagentMissing(
            f'Lagent is not installed at {folder}.\n'
            f'It is made by:     {command_of(folder)}\n'
            'or without Lagent: the same command with --no-lagent'
        )
    found = [file.read_text(encoding='utf-8') for file in folder.glob(f'lib/*/*/{LINKS}')]
    if links() not in found:
        raise LagentMissing(
            f'{folder} was made for another environment than {sys.prefix}.\n'
            f'Make it again: {command_of(folder)}'
        )
    return python_of(folder)


def links() -> str:
    """What lets another interpreter see the packages of this one."""
    here = [path for path in sys.path if Path(path).name in ('site-packages', 'dist-packages')]
    return ''.join(f'import site; site.addsitedir({path!r})\n' for path in here)


def make(folder: Path) -> str:
    """Make the environment, or complete it.

    It sees all that this interpreter's environment has, PyTorch above all, which is not installed
    again; what both have and Lagent needs otherwise lies in front.

    Args:
        folder: Where.

    Returns:
        The version of Lagent in it.

    Raises:
        LagentMissing: If it cannot be made, with what pip said.
    """
    if not python_of(folder).exists():
        why = f'{sys.executable} cannot make an environment'
        _run([sys.executable, '-m', 'venv', '--without-pip', str(folder)], why)
    python = str(python_of(folder))
    asked = _run([python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'], python)
    (Path(asked.strip()) / LINKS).write_text(links(), encoding='utf-8')
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '--python', python]
    pinned = ['-c', str(CONSTRAINTS)] if CONSTRAINTS.exists() else []
    why = 'pip cannot install what Lagent needs: is PyPI within reach?'
    _run([*pip, 'install', '--quiet', *pinned, '-r', str(REQUIREMENTS)], why)
    # Its own pins (pydantic 2.6.4, the whole of Jupyter) are of nothing that is used here.
    _run([*pip, 'install', '--quiet', '--no-deps', LAGENT], why)
    return check(folder)


def check(folder: Path) -> str:
    """The version of Lagent in an environment, if all that is needed can be imported there.

    Raises:
        LagentMissing: If not, with the reason.
    """
    why = f'{folder} is broken; make it again: {command_of(folder)}'
    return _run([str(python_of(folder)), '-c', _CHECK], why).strip()


def _run(command: list[str], what: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = '\n'.join((done.stderr or done.stdout).strip().splitlines()[-15:])
        raise LagentMissing(f'{what}\n{said}')
    return done.stdout
