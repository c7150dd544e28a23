import fcntl
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from internlm_mm.sandbox import Limits, process, usage
from internlm_mm.sandbox.confine import descendants
from internlm_mm.sandbox.usage import (
    Disk,
    cpu_seconds,
    file_system,
    folder_tree,
    lock_count,
    memory_bytes,
    over_limit,
    remove_tree,
    socket_bytes,
)

LIMITS = Limits(files=50, disk_mb=1)


def look(folder: Path, processes: tuple[int, ...] = ()) -> Disk:
    handle = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        return folder_tree(handle, processes, LIMITS)
    finally:
        os.close(handle)


def test_a_tree(tmp_path: Path) -> None:
    assert look(tmp_path) == Disk(0, 0) or look(tmp_path).files == 0
    (tmp_path / 'a/b').mkdir(parents=True)
    (tmp_path / 'a/b/file').write_bytes(bytes(100_000))
    os.symlink('/usr', tmp_path / 'a/usr')
    found = look(tmp_path)
    blocks = sum(path.lstat().st_blocks for path in tmp_path.rglob('*')) * 512
    assert found == Disk(blocks, 4) and blocks >= 100_000
    assert over_limit(found, LIMITS) is None


def test_trees_that_are_too_large(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / str(number)).touch()
    assert over_limit(look(tmp_path), LIMITS) == 'files'
    big = tmp_path / 'big'
    big.mkdir()
    (big / 'file').write_bytes(bytes(2 << 20))
    assert over_limit(look(big), LIMITS) == 'disk_mb'
    deep = tmp_path / 'deep'
    deep.joinpath(*'d' * 70).mkdir(parents=True)
    assert over_limit(look(deep), LIMITS) == 'files'


def test_files_that_are_deleted_and_still_open(tmp_path: Path) -> None:
    # Another process: this one may hold many deleted files of other tests.
    holds = (
        'import os, sys\n'
        'file = open(sys.argv[1], "wb")\n'
        'file.write(bytes(2 << 20))\n'
        'file.flush()\n'
        'os.unlink(sys.argv[1])\n'
        'print(flush=True)\n'
        'sys.stdin.read()\n'
    )
    process = subprocess.Popen(
        [sys.executable, '-c', holds, str(tmp_path / 'gone')],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None and process.stdout.readline()
        assert look(tmp_path).size == 0
        assert over_limit(look(tmp_path, (process.pid,)), LIMITS) == 'disk_mb'
        process.communicate()
    assert process.returncode == 0


HIDES = """
import mmap, os, sys, threading
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.write(file, bytes(2 << 20))
os.unlink(sys.argv[1])
"""
IN_MEMORY = """
import ctypes
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap(None, ctypes.c_size_t(4096), 1, 2, file, ctypes.c_long(0))
os.close(file)
print(flush=True)
sys.stdin.read()
"""
IN_A_THREAD = """
import ctypes
block = bytearray(30 << 20)
def stay():
    print(flush=True)
    sys.stdin.read()
    os._exit(0)
threading.Thread(target=stay).start()
ctypes.CDLL(None).syscall(60, 0)
"""


@pytest.mark.parametrize('where', [IN_MEMORY, IN_A_THREAD], ids=['in memory', 'in a thread'])
def test_deleted_files_that_are_hidden(tmp_path: Path, where: str) -> None:
    """Mapped and closed; or of a process that looks dead, for its first thread has ended."""
    process = subprocess.Popen(
        [sys.executable, '-c', HIDES + where, str(tmp_path / 'gone')],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None and process.stdout.readline()
        time.sleep(0.05)  # until the first thread has ended
        assert over_limit(look(tmp_path, (process.pid,)), LIMITS) == 'disk_mb'
        assert memory_bytes([process.pid], 1 << 40) > 5 << 20
        assert memory_bytes([process.pid], 0) > 5 << 20
        process.communicate()


def test_what_is_swapped_out_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's files of a process, as they are while half of its memory is swapped out."""
    owner = tmp_path / 'process'
    owner.mkdir()
    (owner / 'statm').write_text('50000 1000 100 1 0 1 0\n')
    (owner / 'status').write_text('VmRSS:\t 4000 kB\nVmSwap:\t 90000 kB\n')
    monkeypatch.setattr(usage, '_living', lambda process: str(owner))
    page = os.sysconf('SC_PAGE_SIZE')
    assert memory_bytes([1], 50_000 * page) == 1000 * page  # it cannot have more than that
    swapped = 1000 * page + (90_000 << 10)
    assert memory_bytes([1], 49_999 * page) == swapped
    assert memory_bytes([1], 90_000 << 10) == swapped  # without a table of shares
    (owner / 'smaps_rollup').write_text('Rss: 4000 kB\nPss: 300 kB\nSwapPss: 80000 kB\n')
    assert memory_bytes([1], 90_000 << 10) == 80_300 << 10


def test_a_file_system_of_its_own() -> None:
    handle = os.open('/dev/shm', os.O_PATH | os.O_DIRECTORY)
    before = file_system(handle)
    path = Path(f'/dev/shm/test-usage-{os.getpid()}')
    try:
        path.write_bytes(bytes(1 << 20))
        after = file_system(handle)
    finally:
        path.unlink()
        os.close(handle)
    assert after.size - before.size >= 1 << 20 and after.files > before.files


def test_memory_and_time_of_processes() -> None:
    code = (
        'import time\nblock = bytearray(60 << 20)\nend = time.process_time() + 0.3\n'
        'while time.process_time() < end: pass\nprint(flush=True)\ntime.sleep(30)'
    )
    child = subprocess.Popen([sys.executable, '-S', '-c', code], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        assert 0.25 <= cpu_seconds([child.pid]) < 3
        plain = memory_bytes([child.pid], 1 << 40)
        shared = memory_bytes([child.pid], 0)
        for found in (plain, shared):
            assert 60 << 20 < found < 120 << 20
        assert shared <= plain
    finally:
        child.kill()
        child.communicate()
    assert cpu_seconds([2**30]) == 0 and memory_bytes([2**30], 0) == 0


def test_locks_of_processes(tmp_path: Path) -> None:
    with (tmp_path / 'locked').open('w+') as file:
        before = lock_count([os.getpid()])
        for place in range(300):
            fcntl.lockf(file, fcntl.LOCK_EX, 1, 2 * place)
        assert lock_count([os.getpid()]) == before + 300
        assert lock_count([2**30]) == 0
    assert lock_count([os.getpid()]) == before


def test_what_is_shared_counts_once() -> None:
    block = bytearray(80 << 20)
    block[::4096] = b'x' * len(block[::4096])
    children = []
    try:
        for _ in range(3):
            children.append(os.fork())
            if children[-1] == 0:
                time.sleep(30)
                os._exit(0)
        time.sleep(0.1)
        plain = memory_bytes(children, 1 << 40)
        assert plain > 3 * (80 << 20)
        assert memory_bytes(children, 0) < plain / 2
    finally:
        for child in children:
            os.kill(child, 9)
            os.waitpid(child, 0)


@pytest.mark.parametrize('depth', [1, 40, 120])
def test_removing_trees_of_any_depth(tmp_path: Path, depth: int) -> None:
    kept = tmp_path / 'kept'
    kept.write_text('kept')
    root = tmp_path / 'root'
    root.mkdir()
    here = os.getcwd()
    try:
        os.chdir(root)
        for level in range(depth):
            Path('file').touch()
            os.symlink(tmp_path, 'up')
            os.symlink(kept, 'link')
            os.mkdir('d', 0o700)
            if level % 7 == 3:
                os.mkdir('closed', 0)
            os.chdir('d')
    finally:
        os.chdir(here)
    remove_tree(root)
    assert [path.name for path in tmp_path.iterdir()] == ['kept'] and kept.read_text() == 'kept'


def test_sockets_by_those_that_hold_them() -> None:
    """A pair of a copy is the same pair; what is closed counts no more."""
    most = int(Path('/proc/sys/net/core/wmem_default').read_text()) * 3 // 2
    before = len(usage._sockets(os.getpid()))
    pairs = [socket.socketpair() for _ in range(20)]
    copy = os.fork()
    if copy == 0:
        time.sleep(20)
        os._exit(0)
    try:
        together = socket_bytes([os.getpid(), copy], None)
        assert together == (before + 40 - 16) * most
    finally:
        os.kill(copy, 9)
        os.waitpid(copy, 0)
        for one in [end for pair in pairs for end in pair]:
            one.close()
    assert socket_bytes([os.getpid()], None) == max(0, before - 16) * most
    assert socket_bytes([copy], None) == socket_bytes([], None) == 0


def test_sockets_of_a_network() -> None:
    """Also those that nobody holds: they wait to be accepted."""
    name = f'\0internlm_mm-{os.getpid()}'
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen(64)
        before = socket_bytes([], os.getpid())
        for _ in range(50):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(name)
        assert socket_bytes([], os.getpid()) - before > 20 * 212_992
        assert len(usage._sockets(os.getpid())) < 50


def test_a_host_that_can_open_no_files(tmp_path: Path) -> None:
    """What cannot be looked at is not taken for ended, empty or too much."""
    folder = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    child = subprocess.Popen(['sleep', '20'])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        for look in (
            lambda: descendants(os.getpid()),
            lambda: process._all_stopped(child.pid),
            lambda: process._life(child.pid),
            lambda: lock_count([child.pid]),
            lambda: socket_bytes([child.pid], None),
            lambda: folder_tree(folder, [], LIMITS),
        ):
            with pytest.raises(OSError, match='Too many open files'):
                look()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(folder)
        child.kill()
        child.wait()
