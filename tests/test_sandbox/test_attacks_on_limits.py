"""Programs that want too much of everything. Each test says what the host sees of it."""

import os
import time
from pathlib import Path

import pytest

from tests.sandbox_host import SMALL, Host, attack, running, well


def resident(host: Host) -> int:
    """Bytes of memory of all processes of a session, those of the host left out."""
    pages = 0
    for process, _ in host.below():
        try:
            pages += int(Path(f'/proc/{process}/statm').read_text().split()[1])
        except OSError:
            pass
    return pages * os.sysconf('SC_PAGE_SIZE')


def test_one_process_that_wants_all_memory(host: Host) -> None:
    host.run('kept = 5')
    reply = host.run('x = bytearray(10**10)')
    assert reply.status == 'error' and 'MemoryError' in (reply.error or '')
    assert host.run('kept').result == '5'


MANY = """
import os, time
for _ in range(12):
    if os.fork() == 0:
        block = bytearray(60 << 20)
        for place in range(0, len(block), 4096):
            block[place] = 1
        time.sleep(30)
        os._exit(0)
time.sleep(4)
"""


def test_many_processes_that_each_want_a_little(host: Host) -> None:
    reply = host.run(MANY)
    assert reply.limit == 'memory_mb', reply
    assert 'memory' in (reply.error or '')
    assert resident(host) < SMALL.memory_mb << 20
    well(host)


def test_memory_in_files(host: Host) -> None:
    reply = attack(
        host,
        """
        import time
        written = 0
        try:
            for place in ('/dev/shm', '/tmp', '.', os.environ['TMPDIR']):
                for number in range(12):
                    with open(f'{place}/{number}', 'wb') as file:
                        for _ in range(8):
                            written += file.write(bytes(1 << 20))
        except OSError as error:
            print('full', error)
        time.sleep(0.3)
        written >> 20
        """,
    )
    if host.backend == 'bubblewrap':
        assert reply.ok and 'No space left' in reply.stdout
        assert int(reply.result or 99) <= SMALL.disk_mb
    else:
        assert reply.limit == 'disk_mb' or 'full' in reply.stdout, reply
    host.renew()
    well(host)


def test_files_that_are_deleted_and_still_open(host: Host) -> None:
    reply = attack(
        host,
        """
        import time
        held = []
        for number in range(60):
            file = open('gone', 'wb')
            os.unlink('gone')
            held.append(file)
            try:
                file.write(bytes(4 << 20))
                file.flush()
            except OSError as error:
                print('full', error)
                break
        time.sleep(0.3)
        """,
    )
    assert reply.limit == 'disk_mb' or 'No space left' in reply.stdout, reply
    host.renew()


def test_one_file_that_grows(host: Host) -> None:
    reply = host.run(
        'with open("big", "wb") as f:\n    for _ in range(64): f.write(bytes(1 << 20))'
    )
    assert reply.status == 'error' and 'File too large' in (reply.error or ''), reply
    host.renew()


def test_a_million_files(host: Host) -> None:
    reply = host.run('for i in range(10**6): open(f"f{i}", "w").close()')
    assert reply.limit == 'files' and reply.state_lost, reply
    assert host.run('import os; os.listdir(".")').result in ("['.shm', '.tmp']", "['tmp']")


LOCKS = """
import fcntl
file = open('locked', 'w+')
for place in range(1_000_000):
    fcntl.lockf(file, fcntl.LOCK_EX, 1, 2 * place)
"""
DATABASE = """
import sqlite3
base = sqlite3.connect('data.db')
base.execute('create table t (x)')
base.execute('insert into t values (3)')
base.commit()
base.execute('select x from t').fetchall()
"""


def test_a_million_locks(host: Host) -> None:
    """Each is memory of the kernel's that no control group counts."""
    reply = host.run(LOCKS)
    assert (reply.status, reply.limit) == ('killed', 'files'), reply
    assert host.run(DATABASE).result == '[(3,)]'


def test_folders_of_any_depth(host: Host) -> None:
    reply = host.run('import os\nfor _ in range(10**5):\n    os.mkdir("d"); os.chdir("d")')
    assert reply.limit == 'files', reply
    well(host)


BOMB = """
import os, signal
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
while True:
    try:
        os.fork()
    except OSError:
        pass
"""


def test_a_fork_bomb(host: Host) -> None:
    reply = host.run(BOMB, 0.4)
    assert reply.status == 'killed' and reply.limit == 'seconds', reply
    well(host)
    # The host's own: for bubblewrap three and the worker, for Landlock two; the same for a spare.
    assert len(host.below()) <= 8


@pytest.mark.slow
def test_a_fork_bomb_leaves_nothing_to_the_next(host: Host) -> None:
    """Where the kernel counts all processes of a user, a bomb must not raise the next limit."""
    asked = 'import resource\nresource.getrlimit(resource.RLIMIT_NPROC)[0]'
    host.renew()
    first = int(host.run(asked).result or 0)
    for _ in range(3):
        assert host.run(BOMB, 0.4).state_lost
        assert int(host.run(asked).result or 0) <= first + 4


def test_the_number_of_processes(host: Host) -> None:
    reply = host.run(
        'import os, time\nmade = 0\ntry:\n    while made < 500:\n'
        '        if os.fork() == 0: time.sleep(20); os._exit(0)\n        made += 1\n'
        'except OSError: pass\nprint(made)'
    )
    assert 4 <= int(reply.stdout) <= SMALL.processes, reply
    well(host)


def test_threads_are_counted_too(host: Host) -> None:
    reply = host.run(
        'import threading, time\nmade = 0\ntry:\n    while made < 500:\n'
        '        threading.Thread(target=time.sleep, args=(0.2,), daemon=True).start(); made += 1\n'
        'except RuntimeError: pass\nprint(made)'
    )
    assert 4 <= int(reply.stdout) <= SMALL.processes, reply
    host.renew()


@pytest.mark.parametrize('stream', [1, 2])
def test_output_without_end(host: Host, stream: int) -> None:
    host.run('kept = 5')
    reply = host.run(f'import os\nwhile True: os.write({stream}, b"x" * 1000)')
    assert reply.limit == 'output_mb' and reply.status == 'interrupted'
    text = reply.stdout if stream == 1 else reply.stderr
    assert text == 'x' * SMALL.output_chars and reply.truncated
    assert host.run('kept').result == '5'


def test_a_result_and_an_error_without_end(host: Host) -> None:
    reply = host.run('"y" * 10**7')
    assert reply.ok and len(reply.result or '') == SMALL.output_chars and reply.truncated
    reply = host.run('raise ValueError("z" * 10**7)')
    assert reply.status == 'error' and len(reply.error or '') <= SMALL.output_chars
    assert reply.error and reply.error.startswith('Traceback') and reply.error.count('z') > 1000


def test_time(host: Host) -> None:
    host.run('kept = 5')
    began = time.monotonic()
    reply = host.run('while True: pass', 0.3)
    assert reply.timed_out and reply.status == 'interrupted' and reply.limit == 'seconds'
    assert time.monotonic() - began < 20  # it would never end by itself
    assert 'while True' in (reply.error or '') and 'is still there' in (reply.error or '')
    assert host.run('kept').result == '5'


@pytest.mark.parametrize(
    'code',
    [
        'import time; time.sleep(60)',
        pytest.param('import threading; threading.Event().wait()', marks=pytest.mark.slow),
        'import subprocess; subprocess.run(["sleep", "60"])',
        pytest.param('import os; os.read(os.pipe()[0], 1)', marks=pytest.mark.slow),
        'x = pow(7, 10**9)',
        'class Slow:\n    def __repr__(self):\n        while True: pass\nSlow()',
    ],
)
def test_time_in_a_call(host: Host, code: str) -> None:
    host.run('kept = 5')
    reply = host.run(code, 0.2)
    assert reply.timed_out and reply.status == 'interrupted', reply
    assert host.run('kept').result == '5'


@pytest.mark.parametrize(
    'code',
    [
        'import time\nwhile True:\n    try: time.sleep(9)\n    except BaseException: pass',
        pytest.param(
            'import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass',
            marks=pytest.mark.slow,
        ),
        pytest.param(
            'from signal import *\npthread_sigmask(SIG_BLOCK, range(1, 64))\nwhile True: pass',
            marks=pytest.mark.slow,
        ),
        'sum(range(10**12))',
        pytest.param(
            'import os, signal; os.kill(os.getpid(), signal.SIGSTOP)', marks=pytest.mark.slow
        ),
        pytest.param('import re; re.match("(a*)*b", "a" * 60)', marks=pytest.mark.slow),
    ],
    ids=['swallows', 'ignores', 'blocks', 'in C', 'stands still', 'regular expression'],
)
def test_time_of_those_who_do_not_listen(host: Host, code: str) -> None:
    reply = host.run(code, 0.2)
    # The first process of a namespace is not stopped from inside.
    ignored = 'SIGSTOP' in code and host.backend == 'bubblewrap'
    assert reply.ok if ignored else reply.limit == 'seconds', reply
    if 're.match' not in code and not ignored:
        assert reply.state_lost
    well(host)


@pytest.mark.slow
def test_processor_time(host: Host) -> None:
    quick = Host(host.backend, host.user, limits=SMALL_CPU)
    try:
        reply = quick.run('while True: pass')
        assert reply.limit == 'cpu_seconds' and reply.timed_out, reply
        well(quick)
    finally:
        quick.close()


SMALL_CPU = type(SMALL)(seconds=20, cpu_seconds=0.3, grace_seconds=0.4)


def test_limits_cannot_be_raised(host: Host) -> None:
    reply = host.run(
        'import resource\n'
        'for kind in range(16):\n'
        '    try: resource.setrlimit(kind, (resource.RLIM_INFINITY,) * 2); print(kind)\n'
        '    except (ValueError, OSError): pass\n'
    )
    held = {resource_number(name) for name in ('AS', 'CPU', 'FSIZE', 'NOFILE', 'NPROC', 'CORE')}
    assert reply.ok and held.isdisjoint(map(int, reply.stdout.split())), reply


def resource_number(name: str) -> int:
    import resource

    return getattr(resource, f'RLIMIT_{name}')


def test_no_core_is_left(host: Host) -> None:
    reply = host.run(
        'import os, resource\nprint(resource.getrlimit(resource.RLIMIT_CORE))\n'
        'if os.fork() == 0: os.abort()\nprint(os.WCOREDUMP(os.wait()[1]), os.listdir("."))'
    )
    assert reply.ok and 'False' in reply.stdout and 'core' not in reply.stdout, reply
    assert reply.stdout.startswith('(1, 1)') or reply.stdout.startswith('(0, 0)')


@pytest.mark.parametrize('hidden', ['setsid', 'twice'])
def test_children_that_want_to_stay(host: Host, hidden: str) -> None:
    mark = f'48{time.time_ns()}'
    reply = host.run(
        'import os, subprocess\n'
        + (
            f'subprocess.Popen(["sleep", "{mark}"], start_new_session=True)\n'
            if hidden == 'setsid'
            else 'if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n'
            f'        os.execvp("sleep", ["sleep", "{mark}"])\n    os._exit(0)\nos.wait()\n'
        )
        + 'import time; time.sleep(0.1); print("started")'
    )
    assert reply.stdout == 'started\n'
    assert running(mark) == []
    well(host)


def test_children_whose_end_nobody_hears(host: Host) -> None:
    """They are buried, too, and take no room from the cells behind."""
    made = (
        'made = 0\nfor _ in range(15):\n'
        '    child = call(56, 0, None, None, None, None)\n'
        '    if child == 0: os._exit(0)\n'
        '    made += child > 0\nmade'
    )
    for _ in range(3):
        assert attack(host, made).result == '15'
    host.renew()


def test_what_it_changes_in_the_worker_keeps_no_child_alive(host: Host) -> None:
    mark = f'49{time.time_ns()}'
    host.run(
        'import os, signal, sys, subprocess\n'
        'os.kill = os.waitpid = lambda *a: (0, 0)\nsignal.setitimer = lambda *a: None\n'
        f'subprocess.Popen(["sleep", "{mark}"], start_new_session=True)\n'
    )
    assert running(mark) == []
    host.renew()


def worker_states(host: Host) -> set[str]:
    found = set()
    for process, line in host.below():
        if 'worker.pyc' in line:
            try:
                found.add(Path(f'/proc/{process}/stat').read_text().rpartition(') ')[2][0])
            except OSError:
                pass
    return found


def test_threads_stand_still_between_cells(host: Host) -> None:
    host.run(
        'import threading\ncount = 0\ndef work():\n    global count\n    while True: count += 1\n'
        'threading.Thread(target=work, daemon=True).start()'
    )
    first = int(host.run('count').result or 0)
    time.sleep(0.5)
    deadline = time.monotonic() + 20
    while 'R' in worker_states(host) and time.monotonic() < deadline:
        time.sleep(0.05)  # another session is being started, to be kept ready
    assert 'R' not in worker_states(host)
    second = int(host.run('count').result or 0)
    assert second - first < 10 * max(first, 10**6)  # half a second would be far more
    host.renew()


def test_recursion(host: Host) -> None:
    assert 'RecursionError' in (host.run('def f(): f()\nf()').error or '')
    reply = host.run('import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()', 0.3)
    assert reply.status in ('killed', 'error', 'interrupted'), reply
    well(host)
