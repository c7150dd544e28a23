import os
import sys
from pathlib import Path

import pytest

from internlm_mm.sandbox import Limits, Python, SandboxError, backends
from internlm_mm.sandbox.backends import Tools, bubblewrap, choose_user, landlock, missing

TOOLS = Tools(Python('/usr/bin/python3', (3, 11), '/usr', ('/env/site',)), Path('/x'), Limits())
FEATURES = frozenset({'--size', '--disable-userns'})


def test_bubblewrap_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, 'which', lambda name: None)
    assert missing('bubblewrap') == f'bwrap is not installed: {backends.INSTALL}'
    assert 'apt install bubblewrap' in backends.INSTALL
    monkeypatch.setattr(backends, 'which', lambda name: None if name == 'prlimit' else name)
    assert 'util-linux' in (missing('bubblewrap') or '')


@pytest.mark.parametrize(
    ('version', 'reason'), [(0, 'no Landlock'), (2, 'too old'), (3, None), (7, None)]
)
def test_landlock_missing(
    monkeypatch: pytest.MonkeyPatch, version: int, reason: str | None
) -> None:
    monkeypatch.setattr(backends, 'landlock_version', lambda: version)
    found = missing('landlock')
    assert found is None if reason is None else reason in (found or '')


@pytest.mark.parametrize('name', backends.NAMES)
def test_other_systems(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(sys, 'platform', 'darwin')
    assert missing(name) == 'it needs Linux, and this is darwin'


def test_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.platform, 'machine', lambda: 'riscv64')
    monkeypatch.setattr(backends, 'supported', lambda: False)
    assert 'riscv64' in (missing('landlock') or '')
    assert missing('plain') is None


def test_names() -> None:
    with pytest.raises(ValueError, match=r"'bubblewarp' is unknown. Did you mean 'bubblewrap'"):
        backends.check_name('bubblewarp', backends.NAMES)


def test_a_user_of_its_own() -> None:
    users = {choose_user() for _ in range(20)}
    if os.getuid() != 0:
        assert users == {None}
    else:
        assert len(users) > 15 and all(user and user > 61_000 for user in users)


def test_root_without_other_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.os, 'getuid', lambda: 0)
    monkeypatch.setattr(backends.Path, 'read_text', lambda self: '0 0 1\n')
    with pytest.raises(SandboxError, match='Start it as an ordinary user'):
        choose_user()
    monkeypatch.setattr(backends.Path, 'read_text', lambda self: '0 100000 65536\n')
    assert 61_184 <= (choose_user() or 0) < 65_520


def test_the_command_of_bubblewrap() -> None:
    command = bubblewrap(TOOLS, FEATURES)
    line = list(command.arguments(40, 41, 42))
    text = ' '.join(line)
    assert '--unshare-all' in line and '--disable-userns' in line and '--die-with-parent' in line
    assert '--ro-bind /env/site /run/sandbox-packages/0' in text
    assert f'--size {128 << 20} --tmpfs /work' in text
    assert '--seccomp 42' in text and line[line.index('/run/sandbox/worker.pyc') + 1] == '41'
    binds = {line[i + 1] for i, part in enumerate(line) if part in ('--bind', '--dev-bind')}
    assert binds == {f'/dev/{name}' for name in ('null', 'full', 'random', 'urandom')}
    assert command.environment.keys() == {'PATH'} and command.scratch is None


def test_an_older_bubblewrap() -> None:
    line = bubblewrap(TOOLS, frozenset()).arguments(40, 41, 42)
    assert '--size' not in line and '--disable-userns' not in line


def test_usr_local_is_hidden_unless_python_is_there() -> None:
    if not Path('/usr/local').is_dir():
        pytest.skip('no /usr/local here')
    hide = '--tmpfs /usr/local'
    local = Tools(Python('/usr/local/bin/python3', (3, 12), '/usr/local', ()), Path('/x'), Limits())
    assert hide in ' '.join(bubblewrap(TOOLS, FEATURES).arguments(1, 2, 3))
    assert hide not in ' '.join(bubblewrap(local, FEATURES).arguments(1, 2, 3))


def test_the_command_of_landlock(tmp_path: Path) -> None:
    scratch = tmp_path / 'scratch'
    scratch.mkdir()
    command = landlock(TOOLS, scratch, 6)
    line = list(command.arguments(40, 41, 42))
    place = line.index('/x/confine.pyc')
    assert line[place + 1 : place + 5] == ['40', '41', '42', '6']
    paths = line[place + 5 : line.index('--')]
    writable, readable = paths[: paths.index('')], paths[paths.index('') + 1 :]
    assert writable == [str(scratch), '/dev/null', '/dev/full']
    assert '/usr' not in readable and '/etc' not in readable and '/proc' not in readable
    assert '/' not in readable and len(command.filter) > 0
    assert (scratch / 'tmp').is_dir() and command.scratch == str(scratch)
    if os.getuid() == 0:
        assert scratch.stat().st_uid == command.user != 0
    else:
        assert command.user is None


def test_threads_of_a_user_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, 'RUNNING', set())
    for process, tasks in (('1', 2), ('22', 3)):
        for task in range(tasks):
            (tmp_path / process / 'task' / str(task)).mkdir(parents=True)
    (tmp_path / 'self').mkdir()
    assert backends._count_threads(os.getuid(), str(tmp_path)) == 5
    assert backends._count_threads(os.getuid() + 1, str(tmp_path)) == 0
    # One that is almost gone, and a session, which gives none of what it has to the next.
    (tmp_path / '33/task/33').mkdir(parents=True)
    (tmp_path / '33/stat').write_text('33 (sleep) X 1 33')
    for task in range(40):
        (tmp_path / f'{2**22 + 1}/task/{task}').mkdir(parents=True)
    monkeypatch.setattr(backends, 'RUNNING', {2**22 + 1})
    assert backends._count_threads(os.getuid(), str(tmp_path)) == 5 + 2


@pytest.mark.parametrize(
    ('release', 'own'),
    [('5.4.0-150-generic', False), ('5.13', False), ('5.14.0', True), ('6.18.44', True)],
)
def test_how_the_kernel_counts_processes(release: str, own: bool) -> None:
    assert backends._counts_by_namespace(release) == own
    here = backends._processes(None, Limits(processes=10), own)
    assert here == 10 if own else here > 10
    assert backends._processes(61_999, Limits(processes=10), own) == 10
