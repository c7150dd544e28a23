import os
import sys
import time
from pathlib import Path

import pytest

from internlm_mm.sandbox.process import Command, Processes, StartError

READY = 'import os, sys; os.write(int(sys.argv[1]), b"up"); '


def command(code: str, depth: int = 0) -> Command:
    """A program in the worker's place, under a shell that stands around it."""
    return Command(
        arguments=lambda lifeline, control, code_file: [
            '/bin/sh', '-c', '"$@"; exit $?', 'sh', sys.executable, '-S', '-c', READY + code,
            str(control),
        ],
        environment={'A': 'b'},
        user=None,
        filter=b'',
        depth=depth or 1,
        variables=frozenset(),
        scratch='/tmp',
    )  # fmt: skip


def start(code: str) -> Processes:
    processes = Processes(command(code), 20)
    assert processes.wait_readable() and processes.control.recv(2) == b'up'
    processes.settle()
    return processes


def state(process: int) -> str:
    return Path(f'/proc/{process}/stat').read_text().rpartition(') ')[2][0]


def test_stopping_and_going_on() -> None:
    processes = start('\nwhile True: pass')
    try:
        assert state(processes.worker) == 'R' or state(processes.worker) == 'S'
        processes.stop()
        assert state(processes.worker) == 'T'
        processes.go_on()
        deadline = time.monotonic() + 10
        while state(processes.worker) == 'T' and time.monotonic() < deadline:
            time.sleep(0.01)
        assert state(processes.worker) != 'T'
    finally:
        processes.end()
    assert not Path(f'/proc/{processes.worker}').exists()
    processes.end()  # again


def test_sweeping_leaves_the_worker() -> None:
    processes = start(
        'import subprocess, time; [subprocess.Popen(["sleep", "60"]) for _ in range(3)]; '
        'os.write(int(sys.argv[1]), b"2"); time.sleep(60)'
    )
    try:
        assert processes.wait_readable() and processes.control.recv(1) == b'2'
        assert len(processes.members()) == 5 and processes.first == processes.members()[0]
        assert processes.sweep()
        alive = [one for one in processes.members() if state(one) not in 'ZX']
        assert sorted(alive) == sorted([processes.first, processes.worker])
    finally:
        processes.end()


def test_the_environment_and_the_files_are_what_was_given() -> None:
    processes = start(
        'import time; os.write(int(sys.argv[1]), repr(dict(os.environ)).encode()); time.sleep(60)'
    )
    try:
        processes.wait_readable()
        assert b"'A': 'b'" in (told := processes.control.recv(4096)) and b'HOME' not in told
        assert os.path.samestat(os.fstat(processes.folder), os.stat('/'))
    finally:
        processes.end()


@pytest.mark.parametrize(
    ('code', 'cause'),
    [
        ('sys.exit(3)', 'exit code 3'),
        ('os.kill(os.getpid(), 9)', 'signal SIGKILL'),
        ('os.kill(os.getpid(), 11)', 'signal SIGSEGV'),
    ],
)
def test_how_a_worker_ended(code: str, cause: str) -> None:
    processes = Processes(command(code), 20)
    try:
        assert processes.wait_readable()
        deadline = time.monotonic() + 10
        while processes.cause() == 'it exited or crashed' and time.monotonic() < deadline:
            pass
        assert processes.cause() == cause
    finally:
        processes.end()


def test_other_processes_than_were_expected() -> None:
    processes = Processes(command('import time; time.sleep(60)', depth=3), 20)
    try:
        processes.wait_readable()
        with pytest.raises(StartError, match='1 processes were started, not 3'):
            processes.settle()
    finally:
        processes.end()


def test_a_program_that_is_not_there() -> None:
    none = Command(lambda *_: ['/no/such/program'], {}, None, b'', 1, frozenset())
    with pytest.raises(StartError, match='No such file'):
        Processes(none, 5)
