"""One chat's interpreter: cells go in, replies come out, what was defined stays between them."""

import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType

from internlm_mm.sandbox.backends import SandboxError, check_owner
from internlm_mm.sandbox.exchange import Exchange, frame
from internlm_mm.sandbox.limits import MIB, Limits
from internlm_mm.sandbox.process import StartError
from internlm_mm.sandbox.reply import ProtocolError, Reply, read_outcome
from internlm_mm.sandbox.runner import LiveWorker
from internlm_mm.sandbox.usage import run_seconds

_TICK = 0.02
_AGAIN = 0.2

_ADVICE = {
    'seconds': 'the cell ran longer than {limit:g} s',
    'cpu_seconds': 'the cell used more than {limit:g} s of processor time',
    'memory_mb': 'the session used more than {limit} MiB of memory',
    'output_mb': 'the cell wrote more than {limit} MiB',
    'disk_mb': 'the files of the session are larger than {limit} MiB',
    'files': 'the session made more than {limit} files',
    'asked': 'somebody asked to stop the cell',
}
_KEPT = 'and was interrupted; what was defined before is still there'
_LOST = 'and its interpreter was killed; all that was defined is lost'


class Session:
    """An interpreter that remembers. Made by `Sandbox.session()`; a context manager.

    May be used from any thread, by one at a time.

    Args:
        start: Gives a worker that has proved its confinement.
        limits: Of the session.
        close: Called once, with the session, when it is closed.
    """

    def __init__(
        self,
        start: Callable[[], LiveWorker],
        limits: Limits,
        close: Callable[['Session'], None],
    ) -> None:
        self.limits = limits
        self.last_used = time.monotonic()
        self._owner = os.getpid()
        self._start = start
        self._close = close
        self._worker: LiveWorker | None = start()
        self._lock = threading.RLock()  # a handler of signals may close what runs
        self._began = False
        self._fresh = False
        self._closed = False
        self._asked = False

    def run(self, code: str, seconds: float | None = None) -> Reply:
        """Run one cell.

        Args:
            code: Python. The value of its last expression becomes the reply's result.
            seconds: Wall-clock limit of this cell; the session's when None.

        Raises:
            ValueError: If `code` is longer than the session's limit, or `seconds` is no time.
            SandboxError: If the session is closed or another process's, no interpreter can be
                started, or the host can open no files to watch it.
        """
        check_owner(self._owner)
        data = code.encode('utf-8', 'surrogatepass')
        if len(data) > self.limits.code_kb * 1024:
            raise ValueError(f'code of {len(data)} bytes: code_kb={self.limits.code_kb} at most')
        seconds = self.limits.seconds if seconds is None else seconds
        if not seconds > 0:
            raise ValueError(f'seconds={seconds!r} must be above 0')
        with self._lock:
            if self._closed:
                raise SandboxError('this session of the sandbox is closed')
            worker = self._worker
            if worker is None:
                worker = self._worker = self._start()
                self._fresh = self._began
            self._began = True
            self._asked = False
            try:
                reply = _run(worker, data, seconds, self.limits, lambda: self._asked)
                reply = replace(reply, fresh=self._fresh)
            except BaseException as error:  # Ctrl-C in the host: the cell may still run
                worker.end()
                self._worker = None
                if self._closed and isinstance(error, (OSError, ValueError)):
                    raise SandboxError('this session was closed while its cell ran') from None
                if isinstance(error, OSError):
                    raise SandboxError(
                        f'sandbox: the host cannot watch its sessions ({error}) {_LOST}'
                    ) from None
                raise
            self._fresh = False
            if reply.state_lost:
                worker.end()
                self._worker = None
            self.last_used = time.monotonic()
        return reply

    def interrupt(self) -> None:
        """Raise an exception in the cell that is running, as a limit does; nothing if none is.

        May be called from any thread, and from a handler of signals.
        """
        self._asked = True

    @property
    def processor_seconds(self) -> float:
        """Processor time of the processes that it has just now, since they were started."""
        worker = self._worker
        return 0.0 if worker is None else run_seconds(worker.processes.members())

    @property
    def alive(self) -> bool:
        """Whether it has an interpreter just now."""
        return self._worker is not None

    def rest(self, idle_seconds: float) -> bool:
        """End the interpreter if nobody used it for so long; whether it was ended.

        The next cell starts a fresh one, and its reply says so.
        """
        if not self._lock.acquire(blocking=False):
            return False
        try:
            if self._worker is None or time.monotonic() - self.last_used < idle_seconds:
                return False
            self._worker.end()
            self._worker = None
            return True
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the interpreter and remove its files; may be called again.

        A cell that runs in another thread is interrupted first, as `interrupt` does.
        """
        if os.getpid() != self._owner:
            return  # a copy of the process that made it
        self._asked = True
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._worker is not None:
                self._worker.end()
                self._worker = None
        self._close(self)

    def __enter__(self) -> 'Session':
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _run(
    worker: LiveWorker, code: bytes, seconds: float, limits: Limits, asked: Callable[[], bool]
) -> Reply:
    """Let a worker run a cell and watch it."""
    began = time.monotonic()
    token = secrets.token_hex(16)
    exchange = worker.exchange()
    reached: str | None = None
    try:
        worker.processes.sweep()
        exchange.begin()
        worker.processes.go_on()
        exchange.send(frame(b'C' + code) + frame(token.encode()), limits.grace_seconds)
        reached = _watch(worker, exchange, began, seconds, asked)
        if exchange.answer is not None:
            outcome = read_outcome(exchange.answer, token, limits)
            worker.processes.stop()
            exchange.finish()
            reached = worker.over_limit() or reached
            lost = reached in ('disk_mb', 'files')
            if not lost:
                return Reply(
                    status='interrupted' if reached else outcome.status,
                    stdout=exchange.out.text,
                    stderr=exchange.err.text,
                    result=outcome.result,
                    rich=outcome.rich,
                    images=outcome.images,
                    error=_explain(reached, limits, seconds, outcome.error),
                    limit=reached,
                    truncated=exchange.out.truncated or exchange.err.truncated or outcome.truncated,
                    notes=outcome.notes,
                    elapsed=time.monotonic() - began,
                )
        words = _killed(reached, limits, seconds, worker)
    except (ProtocolError, StartError) as error:
        words = f'SandboxError: the interpreter broke the protocol ({error}) {_LOST}'
    worker.end_processes()
    reached = reached or worker.ran_out()
    if reached and not words.startswith('LimitError'):
        words = _killed(reached, limits, seconds, worker)
    exchange.finish()
    return Reply(
        status='killed',
        stdout=exchange.out.text,
        stderr=exchange.err.text,
        error=words,
        limit=reached,
        truncated=exchange.out.truncated or exchange.err.truncated,
        elapsed=time.monotonic() - began,
    )


def _watch(
    worker: LiveWorker,
    exchange: Exchange,
    began: float,
    seconds: float,
    asked: Callable[[], bool],
) -> str | None:
    """Wait for the answer; the limit that was reached on the way, or None.

    Returns without an answer if the worker has ended or has to be.
    """
    limits = worker.limits
    deadline, kill, again, look = began + seconds, 0.0, 0.0, began + _TICK
    reached: str | None = None
    worker.begin_cell()
    while exchange.answer is None and not exchange.dead:
        now = time.monotonic()
        if now >= look:
            look = now + _TICK
            limit = worker.look()
            # Memory that is still too much after an interrupt is not waited for.
            late = limit == 'memory_mb' and reached is not None and now > again
            if limit in ('files', 'disk_mb') or late:
                return limit
            if limit and reached is None:
                reached, kill = limit, now + limits.grace_seconds
        written = exchange.out.count + exchange.err.count
        if reached is None and written > limits.output_mb * MIB:
            reached, kill = 'output_mb', now + limits.grace_seconds
        if reached is None and now >= deadline:
            reached, kill = 'seconds', now + limits.grace_seconds
        if reached is None and asked():
            reached, kill = 'asked', now + limits.grace_seconds
        if reached is not None:
            if now >= kill:
                return reached
            if now >= again:
                again = now + _AGAIN
                worker.processes.sweep(0.05)
                worker.processes.interrupt()
        until = min(look, deadline if reached is None else min(again, kill))
        exchange.wait(until - now)
    return reached


def _explain(reached: str | None, limits: Limits, seconds: float, error: str | None) -> str | None:
    if reached is None:
        return error
    words = f'{_reason(reached, limits, seconds)} {_KEPT}'
    return f'{error.rstrip()}\n{words}' if error else words


def _killed(reached: str | None, limits: Limits, seconds: float, worker: LiveWorker) -> str:
    if reached is None:
        return f'SandboxError: the interpreter ended ({worker.processes.cause()}) {_LOST}'
    return f'{_reason(reached, limits, seconds)} {_LOST}'


def _reason(reached: str, limits: Limits, seconds: float) -> str:
    limit = seconds if reached == 'seconds' else getattr(limits, reached, None)
    return f'LimitError: {_ADVICE[reached].format(limit=limit)} ({reached})'
