"""SIGTERM and Ctrl-C as a flag that training looks at between steps."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType

REQUEUE_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: stopped by a signal after saving; start the same command again."""


def ignore_stop_signals(worker_id: int = 0) -> None:  # noqa: ARG001  what a DataLoader calls
    """Let SIGTERM and Ctrl-C pass this process by.

    For helpers, which end when the process ends that they help: launchers signal all processes of
    a job, and the last step still needs its data. And for a process that has saved and is leaving.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def outlive_errors() -> None:
    """Let SIGTERM end this process as ever, but not while an error is on its way out.

    Launchers signal the other processes of a job when the first has failed; those that notice by
    an error of their own still have to say whose it was.
    """
    signal.signal(signal.SIGTERM, _end_unless_failing)


def _end_unless_failing(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    if sys.exc_info()[0] is None:  # also set inside `except` and while a `with` is left
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


class StopSignal:
    """Context in which SIGTERM and SIGINT are noted instead of killing the process.

    A second Ctrl-C interrupts at once, for a person who does not want to wait for the step.

    Attributes:
        received: Number of the signal that came, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> 'StopSignal':
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
