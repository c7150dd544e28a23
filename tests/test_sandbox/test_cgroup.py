import os
import subprocess
import sys
from pathlib import Path

import pytest

from internlm_mm.sandbox import cgroup
from internlm_mm.sandbox.cgroup import ControlGroup, find_parent


def fake(parent: Path, *files: str) -> None:
    """Folders made below get these files, as the kernel would make them."""
    make = Path.mkdir

    def mkdir(self: Path, *arguments: object, **more: object) -> None:
        make(self, *arguments, **more)  # type: ignore[arg-type]
        if self.parent == parent:
            for name in files:
                (self / name).write_text('oom_kill 0\nmax 7\n')

    Path.mkdir = mkdir  # type: ignore[method-assign]


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, 'mkdir', Path.mkdir)


V2 = ('memory.max', 'memory.swap.max', 'memory.oom.group', 'pids.max', 'memory.events')


def test_version_2(tmp_path: Path, restored: None) -> None:
    fake(tmp_path, *V2, 'cgroup.procs')
    group = ControlGroup(tmp_path, 1 << 28, 30)
    read = {name: (group.folder / name).read_text() for name in V2[:-1]}
    assert read == {
        'memory.max': str(1 << 28), 'memory.swap.max': '0', 'memory.oom.group': '1',
        'pids.max': '30',
    }  # fmt: skip
    group.add([os.getpid()])
    assert (group.folder / 'cgroup.procs').read_text() == str(os.getpid())
    assert not group.ran_out()
    (group.folder / 'memory.events').write_text('low 0\noom_kill 2\noom 3\n')
    assert group.ran_out() and not group.ran_out()


def test_version_1(tmp_path: Path, restored: None) -> None:
    fake(tmp_path, 'memory.limit_in_bytes', 'memory.memsw.limit_in_bytes', 'memory.oom_control')
    group = ControlGroup(tmp_path, 1 << 28, 30)
    assert (group.folder / 'memory.limit_in_bytes').read_text() == str(1 << 28)
    assert not group.ran_out()


def test_a_folder_that_is_no_group(tmp_path: Path) -> None:
    with pytest.raises(OSError, match='no memory controller'):
        ControlGroup(tmp_path, 1 << 28, 30)
    assert list(tmp_path.iterdir()) == []


def test_groups_of_the_dead_are_removed(tmp_path: Path, restored: None) -> None:
    dead = subprocess.Popen([sys.executable, '-S', '-c', ''])
    dead.wait()
    (tmp_path / f'internlm_mm-{dead.pid}-aa').mkdir()
    (tmp_path / f'internlm_mm-{os.getpid()}-bb').mkdir()
    (tmp_path / 'another').mkdir()
    fake(tmp_path, *V2)
    mine = ControlGroup(tmp_path, 1 << 28, 30).folder.name
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f'internlm_mm-{os.getpid()}-bb', 'another', mine}


@pytest.mark.parametrize(
    ('told', 'expected'),
    [
        ('0::/user.slice/a.scope\n', 'user.slice'),
        ('0::/\n', ''),
        ('5:cpu,memory:/box\n0::/\n', 'memory/box'),
        ('4:memory:/gone\n', 'memory'),
        ('3:cpu:/\n', None),
        ('', None),
    ],
)
def test_where_groups_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str, expected: str | None
) -> None:
    for name in ('user.slice/a.scope', 'memory/box'):
        (tmp_path / name).mkdir(parents=True)
    may = {'user.slice', '', 'memory/box', 'memory'}

    def can_make(parent: Path) -> bool:
        return parent.is_dir() and str(parent.relative_to(tmp_path)).replace('.', '', 1) in {
            name.replace('.', '', 1) for name in may
        }

    monkeypatch.setattr(cgroup, '_can_make', can_make)
    found = find_parent(told, tmp_path)
    assert found == (None if expected is None else tmp_path / expected)


def test_the_kernel_kills_what_takes_too_much() -> None:
    parent = find_parent()
    if parent is None:
        pytest.skip('no control group can be made here: not root, or none is handed on')
    group = ControlGroup(parent, 64 << 20, 30)
    code = 'input()\nblock = bytearray(200 << 20)\nblock[::4096] = b"x" * len(block[::4096])'
    child = subprocess.Popen([sys.executable, '-S', '-c', code], stdin=subprocess.PIPE)
    try:
        group.add([child.pid])
        child.communicate(b'\n', timeout=20)
        assert child.returncode == -9 and group.ran_out()
    finally:
        child.kill()
        child.wait()
        group.remove()
    assert not group.folder.exists()
    group.remove()  # again
