"""Signals become a flag, and a second Ctrl-C still interrupts."""

import os
import signal
import threading

import pytest

from internlm_mm.utils.signals import StopSignal, ignore_stop_signals


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert stop.received == 0
        send(number)
        assert stop.received == number
    assert signal.getsignal(number) is before


def test_repeated_sigterm_is_noted_only() -> None:
    with StopSignal() as stop:
        send(signal.SIGINT)
        send(signal.SIGTERM)
        send(signal.SIGTERM)
    assert stop.received == signal.SIGTERM


def test_a_second_ctrl_c_interrupts() -> None:
    with pytest.raises(KeyboardInterrupt), StopSignal():
        send(signal.SIGINT)
        send(signal.SIGINT)


def test_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopSignal():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_thread_may_not_set_handlers_and_need_not() -> None:
    found = []

    def work() -> None:
        with StopSignal() as stop:
            found.append(stop.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [0]


def test_ignoring() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        ignore_stop_signals()
        send(signal.SIGTERM)
        send(signal.SIGINT)
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)
