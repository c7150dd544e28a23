"""Programs that try to get out. Each test says what the host sees of it."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from tests.sandbox_host import SECRET, Host, all_fail, attack, well


@pytest.fixture
def service() -> Iterator[socket.socket]:
    """A service of this machine that must see nobody."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        with socket.create_connection(server.getsockname()), server.accept()[0]:
            pass  # anybody else reaches it
        server.setblocking(False)
        yield server
        with pytest.raises(BlockingIOError):
            server.accept()


def test_the_network(host: Host, service: socket.socket) -> None:
    port = service.getsockname()[1]
    reply = attack(
        host,
        f"""
        import socket
        attempt('tcp', socket.create_connection, ('127.0.0.1', {port}), 1)
        attempt('ipv6', socket.create_connection, ('::1', {port}), 1)
        attempt('out', socket.create_connection, ('192.0.2.1', 80), 1)
        attempt('udp', lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        attempt('names', socket.getaddrinfo, 'example.com', 80)
        for family in (socket.AF_PACKET, socket.AF_NETLINK, socket.AF_VSOCK, socket.AF_ALG):
            attempt(str(family), socket.socket, family, socket.SOCK_RAW)
        """,
    )
    all_fail(reply, 9)


def test_sockets_of_the_host(host: Host) -> None:
    path = host.folder / 'socket'
    with socket.socket(socket.AF_UNIX) as named, socket.socket(socket.AF_UNIX) as abstract:
        named.bind(str(path))
        path.chmod(0o777)
        abstract.bind(f'\0test-{os.getpid()}-{host.pid}')
        for server in (named, abstract):
            server.listen()
            server.setblocking(False)
        reply = attack(
            host,
            f"""
            import socket
            def connect(address, kind=socket.SOCK_STREAM):
                socket.socket(socket.AF_UNIX, kind).connect(address)
            def send(address):
                socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', address)
            for address in ({str(path)!r}, '\\0test-{os.getpid()}-{host.pid}', '/dev/log'):
                attempt('connect', connect, address)
                attempt('send', send, address)
            """,
        )
        all_fail(reply, 6)
        for server in (named, abstract):
            with pytest.raises(BlockingIOError):
                server.accept()
    path.unlink()


def test_files_of_the_host(host: Host) -> None:
    reply = attack(
        host,
        f"""
        secret = {str(host.secret)!r}
        for path in (secret, '/etc/shadow', '/etc/hostname', '/root/.bashrc', '/sys/kernel/notes'):
            attempt('read ' + path, lambda: open(path).read())
        for path in (secret, secret + '.new', '/usr/bin/new', '/etc/new', '/new', '/dev/new'):
            attempt('write ' + path, lambda: open(path, 'w').write('changed'))
        attempt('unlink', os.unlink, secret)
        attempt('rename', os.rename, secret, secret + '2')
        attempt('cut', os.truncate, secret, 0)
        attempt('python', os.unlink, sys.executable)
        """,
    )
    all_fail(reply, 15)
    assert host.secret.read_text() == 'of the host'
    assert [path.name for path in host.folder.iterdir()] == ['secret.txt']


def test_modes_and_times_of_files_of_the_host(host: Host) -> None:
    before = host.secret.stat()
    reply = attack(
        host,
        f"""
        secret = {str(host.secret)!r}
        attempt('mode', os.chmod, secret, 0)
        attempt('times', os.utime, secret, (0, 0))
        attempt('owner', os.chown, secret, os.getuid(), -1)
        attempt('attribute', os.setxattr, secret, 'user.mark', b'x')
        attempt('python', os.chmod, sys.executable, 0o777)
        attempt('watch', lambda: call(254, libc.inotify_init(), secret.encode(), 0xfff))
        """,
    )
    all_fail(reply, 6)
    after = host.secret.stat()
    assert (after.st_mode, after.st_mtime, after.st_uid) == (
        before.st_mode,
        before.st_mtime,
        before.st_uid,
    )
    assert os.listxattr(host.secret) == []


def test_links_lead_nowhere(host: Host) -> None:
    reply = attack(
        host,
        f"""
        secret = {str(host.secret)!r}
        os.symlink(secret, 'soft')
        os.symlink({str(host.folder)!r}, 'folder')
        attempt('soft link', lambda: open('soft').read())
        attempt('soft link', lambda: open('soft', 'w').write('changed'))
        attempt('hard link', os.link, secret, 'hard')
        attempt('through a folder', os.listdir, 'folder')
        attempt('up', lambda: open('../' * 20 + secret[1:]).read())
        for process in (os.getppid(), {host.pid}):
            attempt('root of a process', lambda: open(f'/proc/{{process}}/root' + secret).read())
        """,
    )
    all_fail(reply, 7)
    host.renew()  # removes the session's folder, links included
    assert host.secret.read_text() == 'of the host'


def test_secrets_of_the_environment(host: Host) -> None:
    reply = attack(
        host,
        """
        import glob
        print(dict(os.environ))
        for path in glob.glob('/proc/[0-9]*/environ') + [f'/proc/{os.getppid()}/environ']:
            try:
                print(open(path).read())
            except OSError:
                pass
        for path in glob.glob('/proc/[0-9]*/cmdline'):
            try:
                print(open(path).read())
            except OSError:
                pass
        """,
    )
    assert reply.ok
    assert SECRET not in reply.text and 'MY_API_KEY' not in reply.text
    assert 'sandbox_host' not in reply.text


def test_processes_of_the_host(host: Host) -> None:
    reply = attack(
        host,
        f"""
        import signal
        for number in (0, signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
            attempt('signal', os.kill, {host.pid}, number)
            attempt('signal', os.kill, {os.getpid()}, number)
        attempt('group', os.killpg, {host.pid}, 9)
        attempt('memory', lambda: open('/proc/{host.pid}/mem', 'rb').read(1))
        attempt('trace', libc.ptrace, 16, {host.pid}, 0, 0)
        attempt('files', lambda: call(438, call(434, {host.pid}, 0), 0, 0))
        attempt('limits', lambda: __import__('resource').prlimit({host.pid}, 7, (5, 5)))
        attempt('cores', os.sched_setaffinity, {host.pid}, [0])
        attempt('rank', os.setpriority, os.PRIO_PROCESS, {host.pid}, 19)
        """,
    )
    all_fail(reply, 15)
    assert os.getpriority(os.PRIO_PROCESS, host.pid) == os.getpriority(os.PRIO_PROCESS, 0)
    well(host)


def test_a_signal_to_all(host: Host) -> None:
    watcher = os.fork()
    if watcher == 0:  # a process of the same user as the host's
        if host.user is not None:
            os.setresuid(*[host.user] * 3)
        time.sleep(30)
        os._exit(0)
    time.sleep(0.05)
    reply = host.run('import os\nos.kill(-1, 9)', 1)
    assert reply.status in ('ok', 'error', 'killed')
    assert os.waitpid(watcher, os.WNOHANG) == (0, 0)
    os.kill(watcher, 9)
    os.waitpid(watcher, 0)
    well(host)


@pytest.mark.parametrize(
    'number',
    ['SIGKILL', 'SIGINT']
    + [pytest.param(name, marks=pytest.mark.slow) for name in ('SIGSTOP', 'SIGTERM', 'SIGSEGV')],
)
def test_signals_to_those_around_it(host: Host, number: str) -> None:
    reply = host.run(
        f'import os, signal\nfor one in (1, os.getppid()):\n'
        f'    try: os.kill(one, signal.{number})\n    except OSError: pass\n5',
        2,
    )
    # In namespaces of its own it is the first process itself.
    seen = [('ok', '5'), ('killed', None)] + [('interrupted', None)] * (number == 'SIGINT')
    assert (reply.status, reply.result) in seen
    well(host)
    assert len(host.below()) <= 8


def test_mounts_and_namespaces(host: Host) -> None:
    reply = attack(
        host,
        """
        import subprocess
        os.makedirs('m', exist_ok=True)
        attempt('mount', libc.mount, b'none', b'm', b'tmpfs', 0, None)
        attempt('bind', libc.mount, b'/', b'm', None, 4096, None)
        attempt('unmount', libc.umount2, b'/usr', 2)
        attempt('remount', libc.mount, None, b'/', None, 32, None)
        for flag in (0x10000000, 0x20000, 0x40000000, 0x20000000, 0x08000000, 0x02000000):
            attempt('unshare', libc.unshare, flag)
            attempt('clone', call, 56, ctypes.c_ulong(flag | 17), None, None, None, None)
        attempt('clone3', call, 435, ctypes.create_string_buffer(88), 88)
        attempt('setns', libc.setns, 0, 0)
        attempt('root', os.chroot, '.')
        attempt('pivot', call, 155, b'.', b'.')
        attempt('program', subprocess.check_output, ['unshare', '-U', 'true'], stderr=-3)
        attempt('new mounts', call, 430, b'tmpfs', 0)
        """,
    )
    all_fail(reply, 22)


def test_doors_of_the_kernel(host: Host) -> None:
    reply = attack(
        host,
        """
        buffer = ctypes.create_string_buffer(256)
        for name, number in dict(
            keyctl=250, add_key=248, bpf=321, perf=298, userfaultfd=323, io_uring=425, memfd=319,
            shmget=29, mq_open=240, module=175, kexec=246, reboot=169, swapon=167, quotactl=179,
            handle=304, clock=227, modify_ldt=154, iopl=172, ptrace=101, vm_read=310,
            personality=135, acct=163, syslog=103, setuid=105, sethostname=170, sync=162,
            syncfs=306,
        ).items():
            arguments = (0, buffer, 0, 0) if name != 'personality' else (0x0040000,)
            attempt(name, call, number, *arguments)
        """,
    )
    all_fail(reply, 27)


def test_what_the_kernel_lets_a_process_say_of_itself(host: Host) -> None:
    """Who is killed first when memory runs out, above all: the host's own word stays."""
    reply = attack(
        host,
        """
        for name in ('oom_score_adj', 'comm', 'uid_map', 'clear_refs', 'attr/current', 'setgroups'):
            attempt(name, open, f'/proc/self/{name}', 'w')
        attempt('pressure', open, '/proc/pressure/cpu', 'w')
        """,
    )
    all_fail(reply, 7)
    workers = [pid for pid, line in host.below() if 'worker.pyc' in line and 'bwrap' not in line]
    said = {Path(f'/proc/{pid}/oom_score_adj').read_text().strip() for pid in workers}
    assert '1000' in said


def test_locks_on_files_of_the_host(host: Host) -> None:
    reply = attack(
        host,
        """
        import fcntl
        whole = b'\\0' * 32
        for path in (sys.executable, '/usr/lib', '/etc/ld.so.cache'):
            file = os.open(path, os.O_RDONLY)
            attempt('lock', fcntl.flock, file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            attempt('lease', fcntl.fcntl, file, 1024, 0)
            attempt('watch', fcntl.fcntl, file, 1026, 1)
            attempt('nobody has it', fcntl.fcntl, file, 37, whole)
        """,
    )
    all_fail(reply, 12)


def test_becoming_somebody_else(host: Host) -> None:
    reply = attack(
        host,
        """
        import subprocess
        attempt('root', os.setuid, 0)
        attempt('root group', os.setgid, 0)
        attempt('groups', os.setgroups, [0])
        for program in ('/usr/bin/su', '/usr/bin/passwd', '/usr/bin/chsh', '/usr/bin/newgrp'):
            attempt('program', subprocess.check_output, [program], stdin=-3, stderr=-3, timeout=3)
        print('uid', os.getuid(), os.geteuid())
        """,
    )
    all_fail(reply, 7)
    ids = reply.stdout.split('uid ')[1].split()
    assert '0' not in ids
    # The last one may be the spare session's, which has its rights until it has come up.
    deadline = time.monotonic() + 10
    while True:
        worker = [pid for pid, line in host.below() if 'worker.pyc' in line][-1]
        status = Path(f'/proc/{worker}/status').read_text()
        fields = dict(line.split(':\t', 1) for line in status.splitlines() if ':\t' in line)
        if int(fields['CapEff'], 16) == 0 or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    assert int(fields['CapEff'], 16) == int(fields['CapPrm'], 16) == 0
    assert fields['NoNewPrivs'] == '1' and fields['Seccomp'] == '2'
    assert '0' not in fields['Uid'].split()


def test_devices_and_terminals(host: Host) -> None:
    reply = attack(
        host,
        """
        import fcntl
        for name in ('tty', 'console', 'kmsg', 'mem', 'kvm', 'fuse', 'ptmx', 'sda', 'vda', 'loop0'):
            attempt(name, open, f'/dev/{name}', 'rb')
        for number in (0, 1, 2):
            attempt('type', fcntl.ioctl, number, 0x5412, b'x')
            attempt('type', fcntl.ioctl, number, 0x5412 | 1 << 40, b'x')
            attempt('paste', fcntl.ioctl, number, 0x541c, b'x')
        attempt('node', os.mknod, 'disk', 0o60600, os.makedev(8, 0))
        attempt('node', os.mknod, 'memory', 0o20600, os.makedev(1, 1))
        """,
    )
    all_fail(reply, 21)


def test_what_it_inherits(host: Host) -> None:
    host.renew()
    reply = host.run(
        dedent("""
        import os, stat
        for number in range(3, 200):
            try:
                kind = stat.S_IFMT(os.fstat(number).st_mode)
            except OSError:
                continue
            print({stat.S_IFIFO: 'pipe', stat.S_IFSOCK: 'socket'}.get(kind, 'another'))
        """)
    )
    # Two copies of its outputs, and the channel to the host.
    assert sorted(reply.stdout.split()) == ['pipe', 'pipe', 'socket']


def test_no_process_around_it_can_be_written_to(host: Host) -> None:
    """Whoever writes into a process of ours would run without our limits."""
    host.renew()
    reply = attack(
        host,
        """
        import glob
        for path in {*glob.glob('/proc/[0-9]*/mem'), f'/proc/{os.getppid()}/mem', '/proc/1/mem'}:
            if path.split('/')[2] != str(os.getpid()):
                attempt(path, open, path, 'r+b')
        print('over')
        """,
    )
    assert reply.ok and 'over' in reply.stdout and 'SUCCEEDED' not in reply.stdout, reply
    # Every process that has the session's user and is not the worker is out of its sight.
    inside = host.run('import os; [n for n in os.listdir("/proc") if n.isdigit()]').result
    assert inside == "['1']" if host.backend == 'bubblewrap' else inside is None
