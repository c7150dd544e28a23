import os
import signal
import subprocess
import sys
import threading

import pytest

from internlm_mm.utils.signals import StopSignal, ignore_stop_signals


@pytest.fixture(autouse=True)
def _handlers_as_before():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_kills_nothing(number: int) -> None:
    with StopSignal() as stop:
        assert stop.received == 0
        os.kill(os.getpid(), number)
        assert stop.received == number


def test_handlers_come_back() -> None:
    mine = []
    signal.signal(signal.SIGTERM, lambda number, frame: mine.append(number))
    with StopSignal():
        os.kill(os.getpid(), signal.SIGTERM)
    assert mine == []
    os.kill(os.getpid(), signal.SIGTERM)
    assert mine == [signal.SIGTERM]


def test_a_second_ctrl_c_does_not_wait() -> None:
    with StopSignal() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_sigterm_waits() -> None:
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM


def test_a_thread_that_may_set_no_handlers() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with StopSignal() as stop:
            seen.append((stop.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(0, before)]


def test_helpers_let_signals_pass_by() -> None:
    ignore_stop_signals()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)


OUTLIVE = """
import os, signal
from internlm_mm.utils.signals import StopSignal, outlive_errors
outlive_errors()
try:
    with StopSignal():
        raise RuntimeError
except RuntimeError:
    os.kill(os.getpid(), signal.SIGTERM)
    print('still here', flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print('not reached')
"""


def test_a_failing_process_outlives_sigterm_until_it_is_done() -> None:
    process = subprocess.run([sys.executable, '-c', OUTLIVE], capture_output=True, text=True)
    assert process.returncode == -signal.SIGTERM
    assert process.stdout == 'still here\n'
