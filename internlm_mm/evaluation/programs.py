"""Programs that a model wrote, run in the sandbox while a task is at work."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from internlm_mm.sandbox import Limits, Reply, Sandbox, SandboxError, Session
from internlm_mm.utils.suggest import did_you_mean

_KEYS = ('backend', 'python', 'limits', 'unsafe')
_EXCEPTIONS = {
    'AssertionError': 'assertion',
    'SyntaxError': 'syntax',
    'IndentationError': 'syntax',
    'TabError': 'syntax',
    'NameError': 'name_error',
    'ModuleNotFoundError': 'no_module',
    'MemoryError': 'memory_mb',
}


class Programs:
    """The sandbox of a task: tried out before the run, open while the task is at work.

    Args:
        settings: `backend`, `python` and `unsafe` as `Sandbox` takes them, and `limits`, a dict
            with those of `Limits`; None for the defaults.
        sessions: Most sessions at a time.

    Raises:
        ValueError: If a setting is none; names it and the nearest.
    """

    def __init__(self, settings: Mapping[str, Any] | None, sessions: int) -> None:
        given = dict(settings or {})
        for key in given:
            if key not in _KEYS:
                raise ValueError(f'sandbox.{key} is unknown.{did_you_mean(key, _KEYS)}')
        try:
            self.limits = Limits(**given.pop('limits', {}))
        except TypeError:
            known = list(Limits.__dataclass_fields__)
            wrong = next(key for key in settings['limits'] if key not in known)  # type: ignore[index]
            hint = did_you_mean(wrong, known)
            raise ValueError(f'sandbox.limits.{wrong} is unknown.{hint}') from None
        except ValueError as error:
            raise ValueError(f'sandbox.limits.{error}') from None
        self._given, self._sessions = given, sessions
        self._sandbox: Sandbox | None = None
        self._lock = threading.Lock()

    def check(self) -> None:
        """Open the sandbox once, which proves that it holds, and close it.

        Raises:
            ValueError: If there is none on this machine; says what to install.
        """
        try:
            self._open().close()
        except SandboxError as error:
            raise ValueError(f'the programs of the model need a sandbox: {error}') from None

    def session(self) -> Session:
        """A fresh interpreter; opens the sandbox if it is not. From any thread.

        Raises:
            SandboxError: If none can be started.
        """
        with self._lock:
            if self._sandbox is None:
                self._sandbox = self._open()
        return self._sandbox.session()

    def close(self) -> None:
        """End all sessions."""
        with self._lock:
            if self._sandbox is not None:
                self._sandbox.close()
                self._sandbox = None

    def _open(self) -> Sandbox:
        return Sandbox(**self._given, limits=self.limits, max_sessions=self._sessions)


@dataclass(frozen=True, slots=True)
class Run:
    """What came of a program.

    Attributes:
        error: '' if it ran to its end; else a class: 'syntax', 'assertion', 'name_error',
            'no_module', 'raised' (another exception), 'timeout', 'killed' (it ended its process),
            'sandbox' (none could be started), or a limit, such as 'memory_mb'.
        result: The value of the last expression, as `repr` gives it; '' if there is none.
        text: The end of what was printed and raised.
    """

    error: str
    result: str
    text: str


def run_cells(programs: Programs, cells: list[str]) -> Run:
    """Run cells one after the other in a session of their own, up to the first that fails.

    The time limit of a cell is that of all of them together.

    Args:
        programs: Gives the session.
        cells: Python, at least one.
    """
    text = ''
    try:
        with programs.session() as session:
            began, seconds = time.monotonic(), programs.limits.seconds
            for cell in cells:
                left = seconds - (time.monotonic() - began)
                reply = session.run(cell, max(left, 0.01))
                text = reply.text[-2000:]
                if not reply.ok:
                    return Run(error_class(reply), '', text)
    except (SandboxError, ValueError) as error:  # no session; code that is too long for a cell
        return Run('sandbox' if isinstance(error, SandboxError) else 'code_kb', '', str(error))
    return Run('', reply.result or '', text)


def error_class(reply: Reply) -> str:
    """The class of what ended a cell; see `Run`."""
    if reply.timed_out:
        return 'timeout'
    if reply.limit is not None:
        return reply.limit
    if reply.status == 'killed':
        return 'killed'
    lines = (reply.error or '').split('\n')
    # The exception follows the lines of the traceback; its message may have lines of its own.
    indented = [number for number, line in enumerate(lines) if line.startswith('  ')]
    told = lines[indented[-1] + 1 :] if indented else lines
    return _EXCEPTIONS.get(told[0].partition(':')[0] if told else '', 'raised')
