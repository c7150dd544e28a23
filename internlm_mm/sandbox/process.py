"""The processes of one session, as the host sees and ends them."""

import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from internlm_mm.sandbox.confine import descendants, lacks_files

_PATIENCE = (
    10.0  # seconds for signals to take effect: on a crowded machine processes wait for a turn
)


RUNNING: set[int] = set()
"""Numbers of the first processes of all sessions of this host."""


class StartError(Exception):
    """A session did not come up."""


@dataclass(frozen=True, slots=True)
class Command:
    """How the processes of a session are started.

    Attributes:
        arguments: The command line, once it is told the numbers of files: lifeline, control
            channel, filter of system calls.
        environment: All of it.
        user: Number of the user and group that it runs as; None: the same as the host's.
        filter: The filter of system calls; none leaves it out.
        depth: How many processes of ours stand between the first and the worker.
        variables: Names of the variables that cells see.
        scratch: Folder of the session outside, where it has one.
    """

    arguments: Callable[[int, int, int], Sequence[str]]
    environment: dict[str, str]
    user: int | None
    filter: bytes
    depth: int
    variables: frozenset[str]
    scratch: str | None = None


class Processes:
    """A started session.

    Attributes:
        control: Channel to the worker.
        outputs: Files of its standard output and standard error.
        worker: Number of the worker's process.
        death: File that becomes readable when the worker ends.
        folder: File that stands for the session's folder.
    """

    def __init__(self, command: Command, seconds: float) -> None:
        self.death = self.folder = self.worker = -1
        self._files: list[int] = []
        self._minded = command.scratch is not None
        self._stopped = False
        try:
            self._first = self._start(command)
        except OSError as error:
            raise StartError(str(error)) from None
        RUNNING.add(self._first.pid)
        for file in self.outputs:
            os.set_blocking(file, False)
        self.keep: frozenset[int] = frozenset()
        self._depth = command.depth
        self._alive = True
        self._deadline = time.monotonic() + seconds

    def _start(self, command: Command) -> subprocess.Popen[bytes]:
        """Start the first process; nothing is left open if that fails."""
        user = {} if command.user is None else _as_user(command.user)
        with ExitStack() as ours, ExitStack() as theirs:
            self.control, inner = socket.socketpair()
            ours.callback(self.control.close)
            theirs.callback(inner.close)
            lifeline, self._lifeline = os.pipe()
            ours.callback(os.close, self._lifeline)
            theirs.callback(os.close, lifeline)
            pipes = []
            for _ in range(2):
                pipes.append(os.pipe())
                ours.callback(os.close, pipes[-1][0])
                theirs.callback(os.close, pipes[-1][1])
            (out, stdout), (err, stderr) = pipes
            self.outputs = (out, err)
            code = os.memfd_create('filter')
            theirs.callback(os.close, code)
            os.write(code, command.filter)
            os.lseek(code, 0, os.SEEK_SET)
            first = subprocess.Popen(
                [*command.arguments(lifeline, inner.fileno(), code)],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                pass_fds=(*((lifeline,) if command.scratch else ()), inner.fileno(), code),
                env=command.environment,
                cwd='/',
                umask=0o077,
                start_new_session=True,
                **user,  # type: ignore[call-overload]
            )
            ours.pop_all()
        return first

    def early(self) -> int | None:
        """Number of the worker's process before it has reported, as soon as it is there."""
        wait = 0.002
        while not is_readable(self.control.fileno(), wait):
            chain = descendants(self._first.pid)
            if len(chain) == self._depth:
                return chain[-1]
            wait = min(1.5 * wait, 0.01)
            if time.monotonic() > self._deadline or self._first.poll() is not None:
                break
        return None

    def settle(self) -> None:
        """Find the worker, once it has reported; before it is given a cell."""
        chain = descendants(self._first.pid)
        if len(chain) != self._depth:
            raise StartError(f'{len(chain)} processes were started, not {self._depth}')
        self.worker = chain[-1]
        self.keep = frozenset(chain)
        try:
            self.death = os.pidfd_open(self.worker)
            self._files.append(self.death)
            flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
            self.folder = os.open(f'/proc/{self.worker}/cwd', flags)
            self._files.append(self.folder)
        except OSError as error:
            raise StartError(f'the worker is out of reach: {error}') from None
        try:  # where the machine has no memory left, a session goes before whatever else runs
            with open(f'/proc/{self.worker}/oom_score_adj', 'w') as file:
                file.write('1000')
        except OSError:
            pass

    def members(self) -> list[int]:
        """The numbers of all processes, ours that stand around the worker included."""
        return [self._first.pid, *descendants(self._first.pid)]

    @property
    def first(self) -> int:
        """Number of the outermost process."""
        return self._first.pid

    def interrupt(self) -> None:
        """Raise an exception in the cell that is running."""
        self._signal(signal.SIGINT)

    def stop(self) -> None:
        """End every process but the worker, and let every thread of that stand still.

        Raises:
            StartError: If they do not.
        """
        deadline = time.monotonic() + _PATIENCE
        while True:
            self._signal(signal.SIGSTOP)
            self._stopped = True
            stopped = self._stands_still(0.05)
            # Others may wake it, or keep a thread of it waiting.
            if self.sweep(0.2) and stopped and _all_stopped(self.worker):
                return
            if time.monotonic() > deadline:
                raise StartError('the worker, or processes that it started, cannot be stopped')

    def go_on(self) -> None:
        """Let the worker run again."""
        if self._stopped:
            self._signal(signal.SIGCONT)
            self._stopped = False

    def sweep(self, seconds: float = _PATIENCE) -> bool:
        """Kill every process but the worker; whether it came to an end.

        Args:
            seconds: How long to try: whoever starts new ones faster than that wins.
        """
        deadline = time.monotonic() + seconds
        while True:
            others = [one for one in descendants(self._first.pid) if one not in self.keep]
            states = {one: _life(one) for one in others}
            if all(state == 'Z' for state in states.values()):
                return True  # one that is gone may have left a child behind
            if time.monotonic() > deadline:
                return False
            # First all stand still, so that none starts another while it is its turn.
            alive = [one for one, state in states.items() if state not in 'ZX']
            self._signal_all(alive, signal.SIGSTOP, signal.SIGKILL)

    def kill(self) -> None:
        """Kill all of them; what they wrote can still be read."""
        deadline = time.monotonic() + 5
        seen: set[int] = set()
        while time.monotonic() < deadline:
            try:
                below = [one for one in descendants(self._first.pid) if _life(one) not in 'ZX']
                if not below:
                    break
                seen.update(below)
                self._signal_all(below, signal.SIGSTOP, signal.SIGKILL)
            except OSError:  # we can open no files: they end with the first of them
                break
            time.sleep(0.0005)
        if self.death >= 0:
            self._signal(signal.SIGKILL)
        if self._lifeline >= 0:
            try:
                os.write(self._lifeline, b'.')  # a copy of ours may hold it open, too
            except BrokenPipeError:
                pass  # nobody minds them, or has ended
            os.close(self._lifeline)
            self._lifeline = -1
        if self._minded:  # who minds them knows for sure when none is left, and ends
            try:
                self._first.wait(timeout=_PATIENCE)
            except subprocess.TimeoutExpired:
                pass
        self._first.kill()
        self._first.wait()
        RUNNING.discard(self._first.pid)
        # The kernel counts them until the last trace of them is gone.
        deadline = time.monotonic() + 0.5
        while self._minded and time.monotonic() < deadline:
            if not any(os.path.exists(f'/proc/{one}') for one in seen):
                break
            time.sleep(0.001)

    def end(self) -> None:
        """Kill all of them and let go of everything; may be called again."""
        if not self._alive:
            return
        self._alive = False
        self.kill()
        for file in (*self._files, *self.outputs):
            os.close(file)
        self.control.close()

    def cause(self) -> str:
        """How the worker ended, as far as it is known."""
        try:
            code = self._first.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            return 'it exited or crashed'
        number = code - 128 if code > 128 else -code
        if number in set(signal.Signals):
            return f'signal {signal.Signals(number).name}'
        return f'exit code {code}'

    def last_words(self, seconds: float = 0.2) -> str:
        """What was written to standard error by processes that did not come up."""
        is_readable(self.outputs[1], seconds)
        try:
            return os.read(self.outputs[1], 4096).decode('utf-8', 'replace').strip()
        except BlockingIOError:
            return ''

    def wait_readable(self) -> bool:
        """Whether the worker reported before the time for starting was over."""
        return is_readable(self.control.fileno(), self._deadline - time.monotonic())

    def _stands_still(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        wait = 0.00005
        while not _all_stopped(self.worker):
            if time.monotonic() > deadline:
                return False
            time.sleep(wait)
            wait = min(1.5 * wait, 0.01)
        return True

    def _signal(self, number: int) -> None:
        try:
            signal.pidfd_send_signal(self.death, number)
        except ProcessLookupError:
            pass  # it has ended; whoever waits for it is told

    def _signal_all(self, processes: Sequence[int], *numbers: int) -> None:
        """Signal those that still are of the session: numbers of processes are given out again."""
        with ExitStack() as opened:
            handles = {}
            for process in processes:
                try:
                    handles[process] = os.pidfd_open(process)
                except OSError as error:
                    if lacks_files(error):
                        raise
                    continue  # it has ended: ESRCH, or ENOENT in the moment in which it does
                opened.callback(os.close, handles[process])
            members = set(descendants(self._first.pid))
            for number in numbers:
                for process in handles.keys() & members:
                    try:
                        signal.pidfd_send_signal(handles[process], number)
                    except OSError:
                        pass  # it has ended


def is_readable(file: int, seconds: float) -> bool:
    """Whether there is something to read, or an end, within so long."""
    poll = select.poll()  # `select` takes no numbers above 1023, which training may well reach
    poll.register(file, select.POLLIN)
    return bool(poll.poll(max(0.0, seconds * 1000)))


def _as_user(user: int) -> dict[str, object]:
    return {'user': user, 'group': user, 'extra_groups': []}


def state(path: str) -> str:
    """State of a process or thread, by the letter of `ps`; X if there is none."""
    try:
        with open(path, 'rb') as file:
            return file.read().rpartition(b') ')[2][:1].decode()
    except OSError as error:
        if lacks_files(error):
            raise
        return 'X'


def _life(process: int) -> str:
    """State of a process: one whose first thread has ended lives on in the others."""
    first = state(f'/proc/{process}/stat')
    if first != 'Z':
        return first
    return next((one for one in _states(process) if one not in 'ZX'), 'Z')


def _all_stopped(process: int) -> bool:
    return all(state in 'TtZX' for state in _states(process))


def _states(process: int) -> list[str]:
    """States of all threads."""
    try:
        tasks = os.listdir(f'/proc/{process}/task')
    except OSError as error:
        if lacks_files(error):
            raise
        return []
    return [state(f'/proc/{process}/task/{task}/stat') for task in tasks]
