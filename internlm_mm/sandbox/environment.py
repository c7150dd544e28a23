"""The Python that cells run in: never the one that models are trained with."""

import os
import stat
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

OLDEST = (3, 10)
"""The oldest Python that a session runs in."""

SCIENCE = ('numpy>=2', 'matplotlib>=3.9', 'sympy>=1.13', 'pandas>=2.2')
"""Packages that code of chats asks for most."""

SYSTEM = ('/usr/bin/python3', '/usr/local/bin/python3')
"""Where the system's own Python is looked for."""

_TAKEN = ('/tmp', '/dev', '/proc', '/work', '/run/sandbox')

_ASK = """\
import sys, sysconfig
paths = [sysconfig.get_path('purelib'), sysconfig.get_path('platlib')]
print(sys.version_info[0], sys.version_info[1], sys.prefix, sys.base_prefix, *dict.fromkeys(paths),
      sep='\\n')
"""

_COMPILE = """\
import os, py_compile, sys
for source in sys.argv[2:]:
    name = os.path.basename(source)
    py_compile.compile(source, f'{sys.argv[1]}/{name}c', dfile=f'<sandbox {name}>', doraise=True)
"""


@dataclass(frozen=True, slots=True)
class Python:
    """An interpreter for cells.

    Attributes:
        executable: Its path, links followed.
        version: Such as (3, 11).
        base: Folder that holds its standard library.
        packages: Folders with what is installed for it.
    """

    executable: str
    version: tuple[int, int]
    base: str
    packages: tuple[str, ...]


SHARED = Path('/var/lib/internlm_mm/sandbox')
"""Where root's environment is, which everyone may use."""


def default_folder() -> Path:
    """Where `make_environment` puts the sandbox's environment if nobody says otherwise."""
    try:
        return SHARED if os.getuid() == 0 else Path.home() / '.local/share/internlm_mm/sandbox'
    except RuntimeError:  # a user without a home
        return SHARED


def find_python(path: str | Path | None = None) -> Python:
    """The interpreter that cells run in.

    Args:
        path: An interpreter, or the folder of a virtual environment. When None, the environment
            that `make_environment` made, and if there is none the system's Python.

    Raises:
        ValueError: If there is no such interpreter, it is too old, or sessions of root, which run
            as a user of their own, could not read it.
    """
    if path is not None:
        return _ask(Path(path))
    for made in (default_folder(), SHARED):
        if os.path.exists(made / 'bin/python'):
            return _ask(made)
    reasons = []
    for candidate in SYSTEM:
        try:
            return _ask(Path(candidate))
        except ValueError as error:
            reasons.append(f'  {error}')
    raise ValueError(
        'no Python for the sandbox; name one: python=PATH, or install python3\n'
        + '\n'.join(reasons)
    )


def make_environment(
    folder: str | Path | None = None,
    packages: Sequence[str] = SCIENCE,
    base: str | Path | None = None,
    constraints: str | Path | None = None,
) -> Python:
    """Make a virtual environment that everyone may read, from the system's Python.

    Args:
        folder: Where; `default_folder()` when None. It may exist: packages are added.
        packages: What is installed, as pip takes it.
        base: The Python that it is made from; the system's when None.
        constraints: A file of versions, as pip takes it.

    Raises:
        ValueError: If there is no such Python, or its installer fails.
    """
    folder = Path(folder) if folder is not None else default_folder()
    base = Path(base) if base is not None else _first_of(SYSTEM)
    _ask(base)
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    # Debian leaves pip out of its venv; ours installs into any environment.
    _run([str(base), '-I', '-m', 'venv', '--without-pip', str(folder)])
    if packages:
        pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '--quiet']
        pinned = [] if constraints is None else ['--constraint', str(constraints)]
        target = ['--python', str(folder / 'bin/python')]
        _run([*pip, *target, 'install', *pinned, *packages])
    _open_to_all(folder)
    return _ask(folder)


def compile_inside(python: Python, folder: Path) -> None:
    """Compile what runs inside, with the Python that runs it: a session starts faster.

    Args:
        python: The interpreter.
        folder: Where the compiled files go; it is made, and everyone may read it.
    """
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    sources = [str(Path(__file__).with_name(f'{name}.py')) for name in ('worker', 'confine')]
    _run([python.executable, '-I', '-S', '-B', '-c', _COMPILE, str(folder), *sources])
    for file in folder.iterdir():
        file.chmod(0o644)


def _first_of(candidates: Sequence[str]) -> Path:
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            return Path(candidate)
    raise ValueError(f'no Python for the sandbox at {" or ".join(candidates)}: apt install python3')


def _ask(path: Path) -> Python:
    executable = path / 'bin/python' if path.is_dir() else path
    if not os.access(executable, os.X_OK):
        raise ValueError(f'python={str(path)!r}: {executable} is no interpreter')
    try:
        # By its own name: a link into a virtual environment says which environment.
        told = subprocess.run(
            [str(executable), '-I', '-B', '-c', _ASK],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            env={},
        ).stdout.splitlines()
        version = (int(told[0]), int(told[1]))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise ValueError(f'python={str(path)!r} does not run: {error}') from None
    if version < OLDEST:
        shown, oldest = ('.'.join(map(str, numbers)) for numbers in (version, OLDEST))
        raise ValueError(f'python={str(path)!r} is {shown}, and sessions need {oldest} or later')
    prefix, base = told[2], os.path.realpath(told[3])
    found = Python(
        executable=os.path.realpath(executable),
        version=version,
        base=base,
        # What is installed for the system's own Python is the host's business.
        packages=tuple(dict.fromkeys(map(os.path.realpath, told[4:]))) if prefix != base else (),
    )
    for taken in _TAKEN:
        if f'{base}/'.startswith(f'{taken}/'):
            raise ValueError(
                f'python={str(path)!r}: {base} lies in {taken}, and sessions have a {taken} of '
                'their own'
            )
    if os.getuid() == 0:
        for needed in (found.executable, found.base, *found.packages):
            _check_readable(Path(needed), str(path))
    return found


def _check_readable(path: Path, named: str) -> None:
    for part in (path, *path.parents):
        mode = part.stat().st_mode
        wanted = stat.S_IXOTH | (stat.S_IROTH if part == path else 0)
        if mode & wanted != wanted:
            raise ValueError(
                f'python={named!r}: {part} ({stat.filemode(mode)}) is closed to others, and '
                'sessions that root starts run as a user of their own. Make one that everyone '
                'may read: python -m internlm_mm sandbox make'
            )


def _open_to_all(folder: Path) -> None:
    for path in (folder, *folder.rglob('*')):
        if not path.is_symlink():
            mode = path.stat().st_mode
            execute = 0o111 if path.is_dir() or mode & 0o100 else 0
            path.chmod(mode | 0o444 | execute)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise ValueError(f'{" ".join(command)} failed:\n{said}')
