"""Landlock as it is, and as older kernels have it: a child gives up its rights and tries."""

import json
import os
import py_compile
import subprocess
import sys
import time
from pathlib import Path

import pytest

from internlm_mm.sandbox import confine
from internlm_mm.sandbox.seccomp import build_filter
from tests.sandbox_host import running

needs_landlock = pytest.mark.skipif(
    confine.landlock_version() < confine.OLDEST, reason='this kernel has no Landlock of version 3'
)

TRIES = """
import json, os, runpy, signal, sys
confine = runpy.run_path(sys.argv[1])
own, other, version, code, host = json.loads(sys.argv[2])
readable = [path for path in (sys.base_prefix, sys.base_exec_prefix, '/usr', '/lib', '/lib64')
            if os.path.exists(path)]
confine['restrict'](readable, [own], version)
if code:
    confine['load_filter'](bytes.fromhex(code))
def attempt(function, *arguments):
    try:
        function(*arguments)
        return True
    except OSError:
        return False
def write(path):
    with open(path, 'w') as file:
        file.write('changed')
print(json.dumps({
    'own': attempt(write, own + '/file') and attempt(os.rename, own + '/file', own + '/file2'),
    'read': attempt(open, other), 'write': attempt(write, other),
    'cut': attempt(os.truncate, other, 0), 'unlink': attempt(os.unlink, other),
    'signal': attempt(os.kill, host, 0), 'list': attempt(os.listdir, '/'),
    'mode': attempt(os.chmod, other, 0), 'python': attempt(open, os.__file__),
    'self': attempt(os.kill, os.getpid(), 0),
}))
"""


@needs_landlock
@pytest.mark.parametrize('version', [3, 4, 5, 6, 99])
def test_versions(tmp_path: Path, version: int) -> None:
    version = min(version, confine.landlock_version())
    own, other = tmp_path / 'own', tmp_path / 'other'
    own.mkdir()
    other.write_text('of the host')
    code = build_filter(False, landlock_signals=version >= confine.SCOPES)
    order = [str(own), str(other), version, code.hex(), os.getpid()]
    done = subprocess.run(
        [sys.executable, '-S', '-c', TRIES, confine.__file__, json.dumps(order)],
        capture_output=True,
        text=True,
        check=True,
        cwd=own,
    )
    could = json.loads(done.stdout)
    signals_stay = version >= confine.SCOPES  # before, the filter lets none out, not even these
    assert could == {
        'own': True, 'python': True, 'self': signals_stay, 'read': False, 'write': False,
        'cut': False, 'unlink': False, 'signal': False, 'list': False, 'mode': False,
    }  # fmt: skip
    assert other.read_text() == 'of the host' and other.stat().st_mode & 0o777 != 0


@needs_landlock
def test_the_version_is_a_number() -> None:
    assert isinstance(confine.landlock_version(), int)


def test_descendants() -> None:
    assert confine.descendants(2**30) == []
    code = 'import subprocess; subprocess.run(["sleep", "30"])'
    child = subprocess.Popen([sys.executable, '-S', '-c', code])
    try:
        deadline = time.monotonic() + 10
        while len(found := confine.descendants(child.pid)) < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(found) == 1
        assert child.pid in confine.descendants(os.getpid())
        assert found[0] in confine.descendants(os.getpid())
    finally:
        for process in found:
            os.kill(process, 9)
        child.wait()


def test_all_is_killed_when_the_host_hangs_up(tmp_path: Path) -> None:
    """The worker's place is taken by a program that leaves a daemon behind."""
    mark = f'47{time.time_ns()}'
    program = tmp_path / 'program.py'
    program.write_text(
        'import os, sys\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n'
        f'        os.execvp("sleep", ["sleep", "{mark}"])\n    os._exit(0)\n'
        'import time\ntime.sleep(60)\n'
    )
    program = Path(py_compile.compile(str(program), str(tmp_path / 'program.pyc')) or '')
    lifeline, held = os.pipe()
    control, inner = os.pipe()
    arguments = [lifeline, control, -1, 0, tmp_path, '', '--', program]
    first = subprocess.Popen(
        [sys.executable, '-S', confine.__file__, *map(str, arguments)],
        pass_fds=[lifeline, control],
        stdin=subprocess.DEVNULL,
    )
    for file in (lifeline, control, inner):
        os.close(file)
    try:
        deadline = time.monotonic() + 20
        while not running(mark) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(running(mark)) == 1
    finally:
        os.close(held)
        first.wait(timeout=20)
    assert running(mark) == []
