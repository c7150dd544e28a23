"""Programs that reach for others by number or outlive them: the host's kernel objects, the host
itself, other sessions, copies of the host. Each test says what the others see of it."""

import ctypes
import fcntl
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from errno import EPERM
from pathlib import Path

import pytest

from internlm_mm.sandbox import Sandbox, SandboxError
from internlm_mm.sandbox.backends import missing
from tests.sandbox_host import Host, all_fail, attack, running, well

BACKENDS = [name for name in ('bubblewrap', 'landlock') if missing(name) is None]
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.shmat.restype = ctypes.c_void_p
LIBC.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]


def as_user(user: int | None, work: str) -> str:
    """What a process of another user prints."""
    more = {} if user is None else {'user': user, 'group': user, 'extra_groups': []}
    python = '/usr/bin/python3' if os.path.exists('/usr/bin/python3') else sys.executable
    done = subprocess.run(
        [python, '-I', '-c', work], capture_output=True, text=True, check=True, cwd='/', **more
    )  # type: ignore[call-overload]
    return done.stdout


@pytest.fixture
def objects(host: Host) -> Iterator[tuple[int, int, int]]:
    """Numbers of shared memory, a semaphore and a queue of the user that has the sandbox."""
    if not hasattr(LIBC, 'shmget'):
        pytest.skip('no System V here')
    mode = 0o600 if host.user is not None else 0o666
    made = as_user(
        host.user,
        'import ctypes\nlibc = ctypes.CDLL(None)\nlibc.shmat.restype = ctypes.c_void_p\n'
        f'memory = libc.shmget(0, 4096, {0o1000 | mode})\n'
        'place = ctypes.c_void_p(libc.shmat(memory, None, 0))\n'
        'ctypes.memmove(place, b"of the host", 11)\n'
        f'print(memory, libc.semget(0, 1, {0o1000 | mode}), libc.msgget(0, {0o1000 | mode}))',
    )
    memory, semaphore, queue = map(int, made.split())
    try:
        yield memory, semaphore, queue
    finally:
        LIBC.shmctl(memory, 0, None)
        LIBC.semctl(semaphore, 0, 0)
        LIBC.msgctl(queue, 0, None)


def test_memory_and_queues_of_the_host(host: Host, objects: tuple[int, int, int]) -> None:
    """Whoever guesses their numbers, which are small, needs no name for them."""
    memory, semaphore, queue = objects
    reply = attack(
        host,
        f"""
        libc.shmat.restype = ctypes.c_void_p
        place = libc.shmat({memory}, None, 0)
        print('memory', 'failed' if place in (None, 2 ** 64 - 1) else 'SUCCEEDED')
        buffer = ctypes.create_string_buffer(256)
        up = ctypes.create_string_buffer(b'\\0\\0\\1\\0\\0\\0', 6)
        attempt('memory: about', libc.shmctl, {memory}, 2, buffer)
        attempt('memory: remove', libc.shmctl, {memory}, 0, None)
        attempt('semaphore: value', libc.semctl, {semaphore}, 0, 12)
        attempt('semaphore: up', libc.semop, {semaphore}, up, 1)
        attempt('semaphore: remove', libc.semctl, {semaphore}, 0, 0)
        attempt('queue: send', libc.msgsnd, {queue}, b'\\1' + bytes(15), 8, 0o4000)
        attempt('queue: receive', libc.msgrcv, {queue}, buffer, 8, 0, 0o4000)
        attempt('queue: remove', libc.msgctl, {queue}, 0, None)
        attempt('queue: by name', libc.mq_unlink, b'/of-the-host')
        """,
    )
    all_fail(reply, 10)
    assert all(line.endswith(f' {EPERM}') for line in reply.stdout.splitlines()[1:-1])
    place = LIBC.shmat(memory, None, 0)
    try:
        assert ctypes.string_at(place, 11) == b'of the host'
    finally:
        LIBC.shmdt(ctypes.c_void_p(place))
    assert LIBC.semctl(semaphore, 0, 12) == 0


def test_what_file_systems_do_besides(host: Host) -> None:
    """Attributes of files of the host; copies of all that lies on the same disk."""
    try:
        os.setxattr(host.secret, 'user.token', b'of the host')
    except OSError:
        pass  # not on this file system: that the name is not found, either, will do
    reply = attack(
        host,
        f"""
        import fcntl
        attempt('attribute', os.getxattr, {str(host.secret)!r}, 'user.token')
        attempt('attributes', lambda: os.listxattr({str(host.secret)!r})[0])
        own = os.open('own', os.O_CREAT | os.O_RDWR)
        here = os.open('.', os.O_RDONLY)
        program = os.open(os.path.realpath(sys.executable), os.O_RDONLY)
        for file in (own, here, program):
            attempt('copy of a tree', fcntl.ioctl, file, 0x50009401, bytes(1000))
            attempt('flags', fcntl.ioctl, file, 0x80086601, bytes(8))
            attempt('seal', fcntl.ioctl, file, 0x40806685, bytes(128))
            attempt('project', fcntl.ioctl, file, 0x801C581F, bytes(28))
        os.close(own), os.close(here), os.close(program)
        """,
    )
    all_fail(reply, 14)


def test_names_of_sockets_of_the_host(host: Host) -> None:
    """Nobody takes a name that a service of the host's wants to have."""
    name = f'\0of-the-host-{host.pid}'
    attack(
        host,
        f"""
        import socket
        kept = socket.socketpair()
        for one, address in zip(kept, ({name!r}, {str(host.folder / 'name')!r})):
            attempt('bind', one.bind, address)
        """,
    )
    with socket.socket(socket.AF_UNIX) as service:
        service.bind(name)
    assert not (host.folder / 'name').exists()
    host.renew()


SOCKETS = """
import os, socket, time

def fill(one):
    one.setblocking(False)
    try:
        while True:
            one.send(bytes(1 << 16))
    except BlockingIOError:
        pass

try:
    server = socket.socket(socket.AF_UNIX)
    server.bind(chr(0) + 'own')
    server.listen(4096)
except PermissionError:
    kept = []
    for _ in range(20):
        if os.fork() == 0:
            for _ in range(55):
                kept += socket.socketpair()
                fill(kept[-1]), fill(kept[-2])
            time.sleep(20)
else:
    for _ in range(4000):
        one = socket.socket(socket.AF_UNIX)
        one.connect(chr(0) + 'own')
        fill(one)
        one.close()  # what waits to be accepted is no open file of anybody
time.sleep(20)
"""


def test_memory_in_sockets(host: Host) -> None:
    """It belongs to no process, and counts all the same."""
    reply = host.run(SOCKETS, 4.5)
    assert reply.limit == 'memory_mb', reply
    attempt = 'import socket\nsocket.socketpair()[0].setsockopt(1, 7, 1 << 30)'
    assert 'PermissionError' in (host.run(attempt).error or '')
    host.renew()


def test_memory_that_the_kernel_gives_on_request(host: Host) -> None:
    """A table of any size, and pages that live on in pipes when their file is gone."""
    reply = attack(
        host,
        """
        import shutil
        for slots in (1 << 10, 1 << 23):
            attempt('table', libc.prctl, 78, 1, ctypes.c_ulong(slots), 0, 0)
        file = os.open('file', os.O_CREAT | os.O_RDWR)
        os.write(file, bytes(1 << 16))
        pipe = os.pipe()
        at = ctypes.byref(ctypes.c_long(0))
        attempt('splice', call, 275, file, at, pipe[1], None, 4096, 0)
        attempt('sendfile', call, 40, pipe[1], file, at, 4096)
        attempt('tee', call, 276, pipe[0], os.pipe()[1], 4096, 2)
        attempt('filter', libc.prctl, 22, 2, ctypes.create_string_buffer(16), 0, 0)
        shutil.copyfile('file', 'copy')
        print(os.path.getsize('copy'))
        os.unlink('file'), os.unlink('copy')
        """,
    )
    all_fail(reply, 6)
    assert reply.stdout.endswith('\n65536\n')
    host.renew()


def test_the_network_of_the_machine(host: Host) -> None:
    """Any socket, of whatever kind, tells the kernel's table of networks."""
    reply = attack(
        host,
        """
        import array, fcntl, socket, struct
        one = socket.socketpair()[0]
        room = array.array('B', bytes(4096))
        try:
            asked = struct.pack('iP', 4096, room.buffer_info()[0])
            size = struct.unpack_from('i', fcntl.ioctl(one, 0x8912, asked))[0]
        except OSError:
            size = 0
        names = [room[at:at + 16].tobytes().rstrip(bytes(1)) for at in range(0, size, 40)]
        print(set(names) - {b'lo'})
        """,
    )
    assert reply.ok and reply.stdout == 'set()\n', reply


KILLED = """
import os, sys, threading, time
from internlm_mm.sandbox import Limits, Sandbox

box = Sandbox(backend=sys.argv[1], spare=0, limits=Limits(seconds=60))
session = box.session()
print(session._worker.processes.worker, flush=True)
if os.fork() == 0:  # a copy, as loaders of data are: it has all files of ours
    time.sleep(10)
    os._exit(0)
session.run(sys.argv[2])
print('done', flush=True)
sys.stdin.read()
"""
STAY = """
import ctypes, signal, threading
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # no signal when the parent dies
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
def spin():
    while True: pass
threading.Thread(target=spin, daemon=True).start()
"""


@pytest.mark.parametrize('name', BACKENDS)
@pytest.mark.parametrize(
    'then', ['print("runs", flush=True); spin()', pytest.param('5', marks=pytest.mark.slow)]
)
def test_a_host_that_is_killed(name: str, then: str) -> None:
    """Neither a cell that runs nor a session that stands still wins against that."""
    host = subprocess.Popen(
        [sys.executable, '-c', KILLED, name, STAY + then],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert host.stdin is not None and host.stdout is not None
        worker = int(host.stdout.readline())
        mark = Path(f'/proc/{worker}/stat').read_text().rpartition(') ')[2].split()[19]
        if then == '5':
            assert host.stdout.readline() == 'done\n'
        else:
            time.sleep(0.3)
        assert still(worker, mark)
    finally:
        host.kill()
        host.wait(timeout=20)
    deadline = time.monotonic() + 8  # before the copy ends
    while still(worker, mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not still(worker, mark)
    host.stdout.close()
    host.stdin.close()


def still(process: int, began: str) -> bool:
    """Whether a process, of which the time that it began is known, has not ended."""
    try:
        fields = Path(f'/proc/{process}/stat').read_text().rpartition(') ')[2].split()
    except OSError:
        return False
    return fields[19] == began and fields[0] not in 'ZX'


@pytest.mark.parametrize('name', BACKENDS)
def test_a_copy_of_the_host_has_no_sessions(name: str) -> None:
    """Else two processes would talk to one interpreter, and one chat would see the other's."""
    with Sandbox(backend=name, spare=1) as box, box.session() as session:
        session.run('mine = 5')
        reader, writer = os.pipe()
        copy = os.fork()
        if copy == 0:
            for attempt in (lambda: session.run('mine = 6'), box.session):
                try:
                    attempt()
                except SandboxError as error:
                    os.write(writer, f'{error}\n'.encode())
            session.close()
            box.close()
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as told:
            lines = told.read().splitlines()
        assert os.waitpid(copy, 0)[1] == 0
        assert len(lines) == 2 and all('this is a copy of that (fork)' in line for line in lines)
        assert session.run('mine').result == '5'


@pytest.mark.parametrize('name', BACKENDS)
def test_a_host_that_can_open_no_files(name: str) -> None:
    """It says so, keeps nothing open, and trusts no session that it could not look at."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    mark = f'47{time.time_ns()}'
    with Sandbox(backend=name, spare=0) as box, box.session() as session:
        opened = len(os.listdir('/proc/self/fd'))
        code = f'import subprocess\nsubprocess.Popen(["sleep", "{mark}"], start_new_session=True)'
        said = []
        for more in (0, 2, 4, 7):
            highest = max(map(int, os.listdir('/proc/self/fd')))
            spare = [os.dup(0) for _ in range(highest + 1 - opened)]  # no free numbers below
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + more, hard))
                for attempt in (box.session, lambda: session.run(code)):
                    try:
                        attempt()
                    except SandboxError as error:
                        said.append(str(error))
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                for file in spare:
                    os.close(file)
        assert said and all('Too many open files' in line for line in said)
        assert running(mark) == []
        box_files = [path.name for path in box._folder.iterdir()]
        assert session.run('6 * 7').result == '42'
        assert len(os.listdir('/proc/self/fd')) <= opened + 12
        assert len(box_files) <= 6


@pytest.mark.parametrize('name', BACKENDS)
def test_folders_with_odd_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    above = Path(tempfile.mkdtemp(prefix='odd-'))
    above.chmod(0o755)
    odd = above / '{control} {0} --\n\u20ac"\'*[:]'
    odd.mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(odd))
    try:
        with Sandbox(backend=name, spare=0) as box, box.session() as session:
            assert box._folder.parent == odd
            assert session.run('open("a", "w").write("abc")').result == '3'
        assert list(odd.iterdir()) == []
    finally:
        odd.rmdir()
        above.rmdir()


def test_no_folder_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> str:
        raise OSError(30, 'Read-only file system')

    monkeypatch.setattr(tempfile, 'mkdtemp', refuse)
    with pytest.raises(SandboxError, match=r'set TMPDIR\. Tried: .*Read-only file system'):
        Sandbox()


def test_locks_between_sessions(host: Host) -> None:
    """What all sessions see, none can lock against the others for longer than it lives."""
    host.run('import fcntl, os\nkept = os.open("/dev/null", os.O_RDWR)\nfcntl.lockf(kept, 2)')
    host.renew()
    with open('/dev/null', 'r+b') as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    well(host)
