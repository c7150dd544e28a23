import dataclasses
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from internlm_mm.sandbox import Limits, Sandbox, SandboxError, backends, find_python, sandbox
from internlm_mm.sandbox.backends import missing
from tests.sandbox_host import running

BACKENDS = [
    pytest.param(
        name, marks=pytest.mark.skipif(missing(name) is not None, reason=str(missing(name)))
    )
    for name in ('bubblewrap', 'landlock')
]


def nothing_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, 'which', lambda name: None)
    monkeypatch.setattr(backends, 'landlock_version', lambda: 0)


def test_without_any_backend_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_works(monkeypatch)
    with pytest.raises(SandboxError) as error:
        Sandbox()
    for words in ('are not run', 'bubblewrap: bwrap is not installed: apt install bubblewrap',
                  'landlock: this kernel has no Landlock', 'unsafe=True'):  # fmt: skip
        assert words in str(error.value)


@pytest.mark.parametrize('name', ['bubblewrap', 'landlock'])
def test_a_backend_that_is_asked_for_and_missing(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    nothing_works(monkeypatch)
    for unsafe in (False, True):  # nothing falls back to another
        with pytest.raises(SandboxError, match=f'{name}: '):
            Sandbox(backend=name, unsafe=unsafe)


def test_unsafe_has_to_be_said_and_is_shown(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match='unsafe=True'):
        Sandbox(backend='plain')
    nothing_works(monkeypatch)
    with Sandbox(unsafe=True, spare=0) as box, box.session() as session:
        assert box.backend == 'plain' and set(box.reasons) == {'bubblewrap', 'landlock'}
        assert session.run('6 * 7').result == '42'
        assert session.run('while True: pass', 0.1).timed_out
        assert session.run('6 * 7').result == '42'
    assert 'NO SANDBOX' in capfd.readouterr().err


@pytest.mark.parametrize('name', BACKENDS)
def test_unsafe_changes_nothing_where_there_is_one(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with Sandbox(backend=name, unsafe=True, spare=0) as box:
        assert box.backend == name
    assert 'NO SANDBOX' not in capfd.readouterr().err


@pytest.mark.parametrize('name', BACKENDS)
def test_the_choice_is_logged_with_its_reason(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if name == 'landlock':
        monkeypatch.setattr(backends, 'which', lambda name: None)
    with caplog.at_level(logging.INFO), Sandbox(spare=0) as box:
        assert box.backend == name
    text = caplog.text
    assert f'sandbox: {name}' in text and 'memory is counted by' in text
    assert ('not bubblewrap (bwrap is not installed' in text) == (name == 'landlock')


@pytest.mark.parametrize(
    ('argument', 'words'),
    [
        ({'backend': 'docker'}, "backend='docker' is unknown"),
        ({'spare': -1}, 'spare=-1'),
        ({'max_sessions': 0}, 'max_sessions=0'),
        ({'idle_seconds': 0}, 'idle_seconds=0'),
        ({'python': '/no/such/python'}, 'is no interpreter'),
    ],
)
def test_arguments(argument: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sandbox(**argument)


@pytest.mark.parametrize('name', BACKENDS)
def test_a_door_that_is_left_open_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the filter of system calls the canary finds a door, and nothing starts."""
    empty = b'\x06\x00\x00\x00\x00\x00\xff\x7f'  # allows all
    monkeypatch.setattr(backends, 'build_filter', lambda *a, **k: empty)
    with pytest.raises(SandboxError, match='the confinement does not hold'):
        Sandbox(backend=name)


@pytest.mark.parametrize('name', BACKENDS)
def test_it_leaves_nothing_behind(name: str) -> None:
    box = Sandbox(backend=name, spare=1)
    folder = box._folder
    session = box.session()
    session.run('open("file", "w").write("x")')
    first = session._worker.processes.first  # type: ignore[union-attr]
    group = session._worker._group  # type: ignore[union-attr]
    box.close()
    box.close()
    assert not folder.exists() and not Path(f'/proc/{first}').exists()
    assert group is None or not group.folder.exists()
    with pytest.raises(SandboxError, match='closed'):
        box.session()


@pytest.mark.parametrize('name', BACKENDS)
@pytest.mark.parametrize('how', ['ends', 'is killed'])
def test_when_the_host_ends(name: str, how: str) -> None:
    """Nothing of a session outlives it, not even a daemon in a cell that runs."""
    mark = f'46{time.time_ns()}'
    code = (
        'import subprocess, time\n'
        f'subprocess.Popen(["sleep", "{mark}"], start_new_session=True)\ntime.sleep(60)'
    )
    host = subprocess.Popen(
        [sys.executable, '-c', 'import sys, threading, time\n'
         'from internlm_mm.sandbox import Limits, Sandbox\n'
         'box = Sandbox(backend=sys.argv[1], spare=0, limits=Limits(seconds=60))\n'
         'run = threading.Thread(target=box.session().run, args=(sys.argv[2],), daemon=True)\n'
         'run.start()\nprint(box._folder, flush=True)\nsys.stdin.read()\n'
         'import os; os._exit(0)', name, code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert host.stdin is not None and host.stdout is not None
        folder = Path(host.stdout.readline().strip())
        deadline = time.monotonic() + 20
        while not sleeping(mark) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(sleeping(mark)) == 1
    finally:
        host.kill() if how == 'is killed' else host.stdin.close()
        host.wait(timeout=20)
        host.stdout.close()
        host.stdin.close()
    while running(mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert running(mark) == []
    # Its folder goes with the next sandbox, once it is a minute old.
    os.utime(folder, (1, 1))
    sandbox._remove_stale(folder.parent)
    assert not folder.exists()


def sleeping(mark: str) -> list[int]:
    return [one for one in running(mark) if Path(f'/proc/{one}/comm').read_text() == 'sleep\n']


def test_folders_of_the_living_are_kept(tmp_path: Path) -> None:
    with Sandbox(spare=0) if missing('landlock') is None else pytest.skip('none') as box:
        os.utime(box._folder, (1, 1))
        sandbox._remove_stale(box._folder.parent)
        assert (box._folder / 'inside/worker.pyc').exists()


@pytest.mark.parametrize('name', BACKENDS)
def test_the_number_of_sessions(name: str) -> None:
    with Sandbox(backend=name, spare=0, max_sessions=2) as box:
        one, _ = box.session(), box.session()
        with pytest.raises(SandboxError, match='max_sessions=2'):
            box.session()
        one.close()
        assert box.session().run('6 * 7').result == '42'


@pytest.mark.parametrize('name', BACKENDS)
def test_idle_interpreters_are_ended(name: str) -> None:
    with Sandbox(backend=name, spare=0, idle_seconds=0.3) as box, box.session() as session:
        session.run('x = 5')
        deadline = time.monotonic() + 20
        while session.alive and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not session.alive
        reply = session.run('"x" in globals()')
        assert reply.result == 'False' and reply.fresh


@pytest.mark.parametrize('name', BACKENDS)
def test_a_spare_that_somebody_killed(name: str) -> None:
    with Sandbox(backend=name, spare=1) as box:
        os.kill(box._spares[0].processes.worker, signal.SIGKILL)
        time.sleep(0.05)
        assert box.session().run('6 * 7').result == '42'


def matching_packages() -> list[str]:
    """This environment's packages, if the system's Python is of the same version."""
    system = find_python('/usr/bin/python3') if Path('/usr/bin/python3').exists() else None
    if system is None or system.version != sys.version_info[:2]:
        pytest.skip('no system Python of the version that the tests run in')
    folder = Path(sys.prefix) / f'lib/python3.{sys.version_info[1]}/site-packages'
    if not (folder / 'matplotlib').exists():
        pytest.skip('no matplotlib here')
    return [str(folder)]


@pytest.mark.slow
@pytest.mark.parametrize('name', BACKENDS)
def test_figures_of_matplotlib(name: str) -> None:
    packages = tuple(matching_packages())
    python = dataclasses.replace(find_python('/usr/bin/python3'), packages=packages)
    limits = Limits(seconds=60)
    with Sandbox(backend=name, python=python, limits=limits, spare=0) as box:
        reply = box.session().run(
            'import matplotlib.pyplot as plt\nplt.plot([1, 4, 9])\nplt.show()\n'
            'plt.figure(figsize=(2, 1))\nprint("two")'
        )
    assert reply.ok and reply.stdout == 'two\n' and reply.stderr == '', reply
    assert [image[:8] for image in reply.images] == [b'\x89PNG\r\n\x1a\n'] * 2


def test_many_threads_open_no_more_sessions_than_allowed() -> None:
    name = next((one for one in ('bubblewrap', 'landlock') if missing(one) is None), None)
    if name is None:
        pytest.skip('no backend here')
    refused: list[str] = []

    def work() -> None:
        try:
            box.session()
        except SandboxError as error:
            refused.append(str(error))

    with Sandbox(backend=name, spare=0, max_sessions=2) as box:
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 4 and len(box._sessions) == 2


def test_a_sandbox_whose_keeper_is_gone() -> None:
    try:
        box = Sandbox(spare=0)
    except SandboxError as error:
        pytest.skip(str(error))
    with box:
        box.session()  # the one that it was tried with
        box._jobs.put(None)
        with pytest.raises(SandboxError, match='closed'):
            box.session()
