"""A process of its own that holds a sandbox, as root or as an ordinary user.

Started by `Host`; as a program, it takes commands as lines of JSON and answers in lines of JSON.
"""

from __future__ import annotations

import base64
import ctypes
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from textwrap import dedent
from typing import Any

from internlm_mm.sandbox import Limits, Reply, Sandbox, SandboxError, Session

SECRET = 'a-secret-of-the-environment-71f3'
# Tests that run beside these have another: the kernel counts all processes of a user.
ORDINARY = 60_100 + os.getpid() % 1000
SMALL = Limits(
    seconds=5,
    grace_seconds=1.5,
    cpu_seconds=20,
    memory_mb=256,
    processes=24,
    disk_mb=16,
    file_mb=8,
    files=400,
    output_chars=4000,
    output_mb=1,
    image_mb=1,
    images=3,
)


TRY = """
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)

def attempt(name, function, *arguments, **more):
    ctypes.set_errno(0)
    try:
        given = function(*arguments, **more)
    except BaseException as error:
        print(name, 'failed', type(error).__name__, getattr(error, 'errno', ''))
    else:
        wrong = isinstance(given, int) and given == -1
        print(name, 'failed' if wrong else 'SUCCEEDED', ctypes.get_errno() if wrong else given)

def call(number, *arguments):
    return libc.syscall(ctypes.c_long(number), *arguments)
"""


def attack(host: Host, code: str, seconds: float | None = None) -> Reply:
    """Run code that has `attempt` and `call`."""
    return host.run(TRY + dedent(code), seconds)


def all_fail(reply: Reply, count: int) -> None:
    """Every attempt was made, and none succeeded."""
    lines = reply.stdout.splitlines()
    assert reply.ok, reply
    assert [line for line in lines if 'SUCCEEDED' in line] == []
    assert sum(' failed' in line for line in lines) == count, reply


def well(host: Host) -> None:
    """The next cell works."""
    assert host.run('6 * 7').result == '42'


class Host:
    """A sandbox in a process of its own, with one session.

    Args:
        backend: Of the sandbox.
        user: Number of the user that the process becomes; None stays.
        limits: Of the session.
    """

    def __init__(self, backend: str, user: int | None = None, limits: Limits = SMALL) -> None:
        self.backend, self.user = backend, user
        # Not the test's own folder: that is closed to other users.
        self.folder = Path(tempfile.mkdtemp(prefix='sandbox-test-'))
        self.folder.chmod(0o777)
        self.secret = self.folder / 'secret.txt'
        self.secret.write_text('of the host')
        self.secret.chmod(0o666)
        if user is not None:
            os.chown(self.secret, user, user)
        order = {'backend': backend, 'user': user, 'limits': dataclasses.asdict(limits)}
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={'PYTHONPATH': str(Path(__file__).parents[1]), 'MY_API_KEY': SECRET},
        )
        self.pid = self._process.pid
        told = self._ask({})
        self.failed: str | None = told.get('failed')

    def run(self, code: str, seconds: float | None = None) -> Reply:
        """Run a cell in its session."""
        told = self._ask({'code': code, 'seconds': seconds})
        told['images'] = tuple(base64.b64decode(image) for image in told['images'])
        told['notes'] = tuple(told['notes'])
        return Reply(**told)

    def renew(self) -> None:
        """Close its session and open another."""
        self._ask({'renew': True})

    def below(self) -> list[tuple[int, str]]:
        """Number and command line of every process below it, wherever it hides."""
        parents: dict[int, int] = {}
        for entry in Path('/proc').iterdir():
            if entry.name.isdigit():
                try:
                    parents[int(entry.name)] = int(
                        (entry / 'stat').read_text().rpartition(') ')[2].split()[1]
                    )
                except OSError:
                    pass
        found, mothers = [], {self.pid}
        while mothers:
            mothers = {child for child, mother in parents.items() if mother in mothers}
            found += mothers
        return [(child, command_line(child)) for child in sorted(found)]

    def close(self) -> int:
        """End it; its exit code."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        code = self._process.wait(timeout=20)
        self._process.stdout.close()
        for path in sorted(self.folder.rglob('*'), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        self.folder.rmdir()
        return code

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        if order:
            self._process.stdin.write(json.dumps(order) + '\n')
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, 'the host is gone'
        return json.loads(line)


def command_line(process: int) -> str:
    """Command line of a process, '' if it is gone."""
    try:
        return Path(f'/proc/{process}/cmdline').read_text().replace('\0', ' ')
    except OSError:
        return ''


def running(mark: str) -> list[int]:
    """All processes of this machine with a mark in their command line."""
    pids = [int(entry.name) for entry in Path('/proc').iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if mark in command_line(pid) and pid != os.getpid()]


def tell(answer: dict[str, Any]) -> None:
    """Answer the test."""
    print(json.dumps(answer), flush=True)


def main(order: dict[str, Any]) -> None:
    """Hold a sandbox until the test hangs up."""
    if order['user'] is not None:
        os.setgroups([])
        os.setresgid(*[order['user']] * 3)
        os.setresuid(*[order['user']] * 3)
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # as a process that was started as that user
    try:
        sandbox = Sandbox(backend=order['backend'], limits=Limits(**order['limits']), spare=1)
    except SandboxError as error:
        tell({'failed': str(error)})
        return
    with sandbox:
        session: Session = sandbox.session()
        tell({'backend': sandbox.backend})
        for line in sys.stdin:
            command = json.loads(line)
            if command.get('renew'):
                session.close()
                session = sandbox.session()
                tell({})
                continue
            reply = dataclasses.asdict(session.run(command['code'], command['seconds']))
            reply['images'] = [base64.b64encode(image).decode() for image in reply['images']]
            tell(reply)


if __name__ == '__main__':
    main(json.loads(sys.argv[1]))
