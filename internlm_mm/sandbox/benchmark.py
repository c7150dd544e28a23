"""How long a session takes to start, and what a cell costs beyond its code."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from internlm_mm.sandbox.sandbox import Sandbox


@dataclass(frozen=True, slots=True)
class Timing:
    """One thing that was timed; all in milliseconds.

    Attributes:
        name: What.
        count: How often.
        median: The middle of all.
        high: What nine of ten stayed below.
    """

    name: str
    count: int
    median: float
    high: float


def measure(sandbox: Sandbox, cold: Sandbox, starts: int = 30, cells: int = 500) -> list[Timing]:
    """Time starts and cells.

    Args:
        sandbox: One that keeps a session ready, as chats have it.
        cold: One that keeps none: each start is a whole one.
        starts: How many sessions are started in each.
        cells: How many cells are run of each kind.
    """

    def start(box: Sandbox) -> float:
        began = time.perf_counter()
        with box.session() as session:
            assert session.run('1').ok
            return time.perf_counter() - began

    def ready() -> float:
        time.sleep(0.25)  # a chat does not begin in the moment after another
        return start(sandbox)

    start(cold)  # the worker that its backend was tried with
    timings = [
        _timing('start, kept ready, to its first reply', starts, ready),
        _timing('start, from nothing, to its first reply', starts, lambda: start(cold)),
    ]
    with sandbox.session() as session:
        for name, code in (('cell: pass', 'pass'), ('cell: 1 + 1, shown', '1 + 1')):

            def cell(code: str = code) -> float:
                began = time.perf_counter()
                session.run(code)
                return time.perf_counter() - began

            timings.append(_timing(name, cells, cell))
    return timings


def load() -> str:
    """What else the machine does, for a line under the figures."""
    return f'{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}'


def _timing(name: str, count: int, once: Callable[[], float]) -> Timing:
    times = sorted(1000 * once() for _ in range(count))
    return Timing(name, count, statistics.median(times), times[int(0.9 * (count - 1))])
