import os
import subprocess
import sys
from pathlib import Path

import pytest

from internlm_mm.sandbox import environment, find_python, make_environment
from internlm_mm.sandbox.environment import compile_inside

SYSTEM = Path('/usr/bin/python3')
needs_system = pytest.mark.skipif(not SYSTEM.exists(), reason='no /usr/bin/python3 here')


@needs_system
def test_the_system_python() -> None:
    python = find_python(SYSTEM)
    told = subprocess.run(
        [SYSTEM, '-c', 'import sys; print(*sys.version_info[:2], sys.base_prefix)'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert [*map(str, python.version), python.base] == told
    assert python.packages == ()  # what the host has installed is none of a session's business
    assert python.executable == os.path.realpath(SYSTEM)


@needs_system
def test_an_environment_that_everyone_may_read(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        made = (
            make_environment(tmp_path / 'env', packages=(), base=SYSTEM)
            if (os.getuid() != 0)
            else None
        )
        folder = tmp_path / 'env'
        if made is None:  # root's must be readable by others, and pytest's folder is not
            with pytest.raises(ValueError, match='closed to others'):
                make_environment(folder, packages=(), base=SYSTEM)
    finally:
        os.umask(before)
    for path in (folder, *folder.rglob('*')):
        if not path.is_symlink():
            wanted = 0o555 if path.is_dir() else 0o444
            assert path.stat().st_mode & wanted == wanted, path
    assert (folder / 'pyvenv.cfg').exists()


def test_no_interpreter(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='is no interpreter'):
        find_python(tmp_path)
    broken = tmp_path / 'python'
    broken.write_text('#!/bin/sh\nexit 3\n')
    broken.chmod(0o755)
    with pytest.raises(ValueError, match='does not run'):
        find_python(broken)


def test_an_old_interpreter(tmp_path: Path) -> None:
    old = tmp_path / 'python'
    old.write_text('#!/bin/sh\nprintf "3\\n8\\n/usr\\n/usr\\n/x\\n"\n')
    old.chmod(0o755)
    with pytest.raises(ValueError, match=r'is 3\.8, and sessions need 3\.10 or later'):
        find_python(old)


@pytest.mark.parametrize('base', ['/tmp/python', '/work', '/dev/shm/x', '/proc/self'])
def test_an_interpreter_where_sessions_have_their_own(tmp_path: Path, base: str) -> None:
    one = tmp_path / 'python'
    one.write_text(f'#!/bin/sh\nprintf "3\\n12\\n{base}\\n{base}\\n/x\\n"\n')
    one.chmod(0o755)
    with pytest.raises(ValueError, match='sessions have a /'):
        find_python(one)


@pytest.mark.skipif(os.getuid() != 0, reason='not root')
def test_what_others_cannot_read(tmp_path: Path) -> None:
    closed = tmp_path / 'python'
    closed.symlink_to(SYSTEM)
    assert find_python(closed).executable == os.path.realpath(SYSTEM)  # links are followed
    copy = tmp_path / 'copy'
    copy.write_text(f'#!/bin/sh\nexec {SYSTEM} "$@"\n')
    copy.chmod(0o755)
    with pytest.raises(ValueError, match='sandbox make'):
        find_python(copy)


def test_where_environments_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.os, 'getuid', lambda: 0)
    assert environment.default_folder() == environment.SHARED
    monkeypatch.setattr(environment.os, 'getuid', lambda: 1000)
    monkeypatch.setattr(environment.Path, 'home', lambda: Path('/home/somebody'))
    assert environment.default_folder().is_relative_to('/home/somebody')

    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.setattr(environment.Path, 'home', homeless)
    assert environment.default_folder() == environment.SHARED


def test_no_system_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, 'SYSTEM', (str(tmp_path / 'python3'),))
    monkeypatch.setattr(environment, 'SHARED', tmp_path)
    monkeypatch.setattr(environment, 'default_folder', lambda: tmp_path)
    with pytest.raises(ValueError, match='no Python for the sandbox'):
        find_python()
    with pytest.raises(ValueError, match='apt install python3'):
        make_environment(tmp_path / 'env', packages=())


@needs_system
def test_what_runs_inside_is_compiled(tmp_path: Path) -> None:
    compile_inside(find_python(SYSTEM), tmp_path / 'inside')
    files = sorted(path.name for path in (tmp_path / 'inside').iterdir())
    assert files == ['confine.pyc', 'worker.pyc']
    done = subprocess.run([SYSTEM, tmp_path / 'inside/worker.pyc'], capture_output=True, text=True)
    assert 'not enough values to unpack' in done.stderr


@pytest.mark.slow
@needs_system
def test_an_installer_that_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='failed:'):
        make_environment(tmp_path / 'env', packages=['--no-such-option'], base=SYSTEM)
    assert Path(sys.executable).exists()
