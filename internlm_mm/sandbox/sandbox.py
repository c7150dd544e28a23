"""Sandboxes: sessions in which programs that a model wrote can do no harm."""

import atexit
import fcntl
import logging
import os
import queue
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from internlm_mm.sandbox import backends
from internlm_mm.sandbox.backends import (
    NAMES,
    SandboxError,
    Tools,
    check_name,
    check_owner,
    explain,
    missing,
)
from internlm_mm.sandbox.cgroup import find_parent
from internlm_mm.sandbox.confine import landlock_version
from internlm_mm.sandbox.environment import Python, compile_inside, find_python
from internlm_mm.sandbox.limits import Limits
from internlm_mm.sandbox.process import Command, StartError
from internlm_mm.sandbox.proof import Traps
from internlm_mm.sandbox.runner import LiveWorker
from internlm_mm.sandbox.session import Session
from internlm_mm.sandbox.usage import remove_tree

LOG = logging.getLogger(__name__)

_PREFIX = 'internlm_mm-sandbox-'

BANNER = """\
******************************************************************************
  NO SANDBOX: programs that a model wrote run on this machine as they are.
  They can read and change the files of user {user}, and reach the network.
******************************************************************************"""


class Sandbox:
    """Starts sessions, each confined and each proved to be before its first cell.

    Args:
        backend: 'bubblewrap', 'landlock', or 'auto': the first of these that this machine has.
        python: Interpreter or virtual environment that cells run in, as `find_python` takes it,
            or what it gave.
        limits: Of every session.
        spare: Sessions that are kept started, so that the next chat does not wait.
        max_sessions: Most sessions at a time.
        idle_seconds: An interpreter that nobody used for so long is ended. Its session lives; the
            next cell starts a fresh one.
        unsafe: Run without any confinement where there is none, after printing a banner. With
            `backend='plain'` in any case.

    Attributes:
        backend: The one that is used.
        reasons: Why the stronger ones are not, by name.

    Raises:
        SandboxError: If this machine cannot confine programs as asked for.
        ValueError: If an argument is none of those above.
    """

    def __init__(
        self,
        backend: str = 'auto',
        python: str | Path | Python | None = None,
        limits: Limits | None = None,
        spare: int = 1,
        max_sessions: int = 16,
        idle_seconds: float = 600.0,
        unsafe: bool = False,
    ) -> None:
        check_name(backend, ('auto', *NAMES))
        if backend == 'plain' and not unsafe:
            raise ValueError("backend='plain' confines nothing: say unsafe=True, too, if you must")
        if spare < 0 or max_sessions < 1 or not idle_seconds > 0:
            raise ValueError(
                f'spare={spare} must be 0 or more, max_sessions={max_sessions} and '
                f'idle_seconds={idle_seconds} above 0'
            )
        self.limits = limits or Limits()
        self.spare, self.max_sessions, self.idle_seconds = spare, max_sessions, idle_seconds
        self.reasons: dict[str, str] = {}
        self._sessions: list[Session] = []
        self._spares: list[LiveWorker] = []
        self._lock = threading.Lock()
        self._closed = False
        self._open = 0
        self._features: frozenset[str] = frozenset()
        self._jobs: queue.Queue[tuple[Callable[[], Any], Future[Any]] | None] = queue.Queue()
        self._traps: Traps | None = None
        self._owner = os.getpid()
        self._folder, self._hold = _open_folder()
        atexit.register(self.close)
        try:
            found = python if isinstance(python, Python) else find_python(python)
            tools = Tools(found, self._folder / 'inside', self.limits)
            self._tools = tools
            if sys.platform == 'linux':
                compile_inside(tools.python, tools.folder)
                self._traps = Traps(self._folder)
            self._groups = find_parent()
            self._keeper = threading.Thread(target=self._keep, name='sandbox', daemon=True)
            self._keeper.start()
            self.backend = self._choose(backend, unsafe)
        except BaseException:
            self.close()
            raise

    def session(self) -> Session:
        """Begin a chat.

        Raises:
            SandboxError: If there are `max_sessions`, no interpreter can be started, or this is
                a copy (fork) of the process that made the sandbox.
        """
        check_owner(self._owner)
        with self._lock:
            self._check_open()
            if self._open >= self.max_sessions:
                raise SandboxError(
                    f'max_sessions={self.max_sessions} sessions are open: close one first'
                )
            self._open += 1
        try:
            session = Session(self._take, self.limits, self._forget)
        except BaseException:
            with self._lock:
                self._open -= 1
            raise
        with self._lock:
            self._sessions.append(session)
        return session

    def close(self) -> None:
        """End all sessions and remove all files; may be called again. So does the program's end."""
        if os.getpid() != self._owner:
            return  # a copy of the process that made it
        with self._lock:
            if self._closed:
                return
            self._closed = True
            sessions = list(self._sessions)
        atexit.unregister(self.close)
        for session in sessions:
            session.close()
        if hasattr(self, '_keeper'):
            self._jobs.put(None)
            self._keeper.join()
        for worker in self._spares:
            worker.end()
        if self._traps is not None:
            self._traps.close()
        remove_tree(self._folder)
        os.close(self._hold)

    def __enter__(self) -> 'Sandbox':
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _choose(self, wanted: str, unsafe: bool) -> str:
        """The first backend that works, tried in earnest; its first worker is kept."""
        names = [name for name in NAMES if name != 'plain'] if wanted == 'auto' else [wanted]
        if unsafe and wanted == 'auto':
            names.append('plain')
        for name in names:
            reason = missing(name)
            if reason is None:
                try:
                    self._spares.append(self._in_keeper(partial(self._start, name)))
                except StartError as error:
                    reason = f'it was tried and failed: {error}'
            if reason is not None:
                self.reasons[name] = reason
                continue
            self._announce(name)
            return name
        raise SandboxError(
            'no sandbox: programs that a model wrote are not run on this machine.\n'
            f'{explain(self.reasons)}\n'
            f'Install bubblewrap: {backends.INSTALL}. Without any protection: unsafe=True'
        )

    def _announce(self, name: str) -> None:
        tried = f'; not {", ".join(f"{k} ({v})" for k, v in self.reasons.items())}'
        memory = 'a control group' if self._groups else 'the host, many times a second'
        if name == 'plain':
            print(BANNER.format(user=os.getuid()), file=sys.stderr)
        LOG.info(
            'sandbox: %s%s; Python %s; memory is counted by %s',
            name,
            tried if self.reasons else '',
            self._tools.python.executable,
            memory,
        )

    def _command(self, name: str) -> Command:
        if name == 'bubblewrap':
            if not self._features:
                self._features = backends.bubblewrap_features()
            return backends.bubblewrap(self._tools, self._features)
        version = landlock_version() if name == 'landlock' else 0
        scratch = Path(tempfile.mkdtemp(prefix='session-', dir=self._folder))
        try:
            return backends.landlock(self._tools, scratch, version)
        except OSError:
            shutil.rmtree(scratch, ignore_errors=True)
            raise

    def _start(self, name: str) -> LiveWorker:
        traps = None if name == 'plain' else self._traps
        try:
            command = self._command(name)
        except OSError as error:
            raise StartError(str(error)) from None
        return LiveWorker(command, self.limits, self._groups, traps)

    def _take(self) -> LiveWorker:
        """A worker for a session: a spare one, or one that is started now."""
        with self._lock:
            self._check_open()
        try:
            # What is asked of the keeper waits until a spare that is being started is there.
            worker = self._spare() or self._in_keeper(self._spare_or_new)
        except StartError as error:
            raise SandboxError(f'sandbox: {self.backend} does not start: {error}') from None
        self._jobs.put((self._refill, Future()))
        return worker

    def _spare(self) -> LiveWorker | None:
        """A worker that is kept started, if there is one and nobody has killed it."""
        while True:
            with self._lock:
                if not self._spares:
                    return None
                worker = self._spares.pop()
            if worker.alive:
                return worker
            worker.end()

    def _spare_or_new(self) -> LiveWorker:
        return self._spare() or self._start(self.backend)

    def _refill(self) -> None:
        while not self._closed and len(self._spares) < self.spare:
            worker = self._start(self.backend)
            with self._lock:
                self._spares.append(worker)

    def _forget(self, session: Session) -> None:
        with self._lock:
            if session in self._sessions:
                self._sessions.remove(session)
                self._open -= 1

    def _check_open(self) -> None:
        if self._closed:
            raise SandboxError('this sandbox is closed')

    def _in_keeper(self, job: Callable[[], LiveWorker]) -> LiveWorker:
        future: Future[LiveWorker] = Future()
        self._jobs.put((job, future))
        while not wait([future], timeout=1.0).done:
            if not self._keeper.is_alive():
                raise SandboxError('this sandbox is closed')
        return future.result()

    def _keep(self) -> None:
        """What one thread does from beginning to end.

        It starts all processes, because those of bubblewrap end with the thread that started
        them, and it ends interpreters that are idle.
        """
        tick = min(1.0, self.idle_seconds / 4)
        looked = time.monotonic()
        while True:
            try:
                job = self._jobs.get(timeout=tick)
            except queue.Empty:
                job = (lambda: None, Future())
            if job is None:
                return
            work, future = job
            try:
                future.set_result(work())
            except BaseException as error:
                if not isinstance(error, StartError):
                    LOG.error('sandbox: %s', error)
                future.set_exception(error)
            if time.monotonic() - looked >= tick:
                looked = time.monotonic()
                with self._lock:
                    sessions = list(self._sessions)
                for session in sessions:
                    try:
                        session.rest(self.idle_seconds)
                    except Exception as error:  # the others are minded all the same
                        LOG.error('sandbox: a session that is idle: %s', error)


def _open_folder() -> tuple[Path, int]:
    """A new folder that every user may enter, for what sessions read; and a lock on it."""
    try:
        first = [tempfile.gettempdir()]
    except OSError:
        first = []  # none can be written to; said below
    tried = []
    for place in dict.fromkeys((*first, '/tmp', '/var/tmp', '/dev/shm')):
        try:
            above = Path(place).resolve()
            if os.getuid() != 0 or all(part.stat().st_mode & 1 for part in (above, *above.parents)):
                return _make_folder(above)
            tried.append(f'{above}: closed to other users')
        except OSError as error:
            tried.append(f'{place}: {error.strerror}')
    raise SandboxError(
        'sandbox: no folder for temporary files that all users may enter and this one may write '
        f'to; set TMPDIR. Tried: {"; ".join(tried)}'
    )


def _make_folder(above: Path) -> tuple[Path, int]:
    _remove_stale(above)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=above))
    try:
        hold = os.open(folder / 'lock', os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        folder.rmdir()
        raise
    fcntl.flock(hold, fcntl.LOCK_EX)
    folder.chmod(0o755)
    return folder, hold


def _remove_stale(above: Path) -> None:
    """Remove folders of sandboxes whose process was killed: nobody holds their lock."""
    for folder in above.glob(f'{_PREFIX}*'):
        try:
            info = folder.lstat()
            if info.st_uid != os.getuid() or time.time() - info.st_mtime < 60:
                continue
            hold = os.open(folder / 'lock', os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(hold, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_tree(folder)
        except OSError:
            pass  # it is held
        finally:
            os.close(hold)
