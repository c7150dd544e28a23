"""How long a session takes to start, and what a cell costs beyond its code."""

import math
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
        high: What 95 of 100 stayed below.
        processor: The middle of the processor time of all, the host's and the session's. On a busy
            machine it is what tells.
    """

    name: str
    count: int
    median: float
    high: float
    processor: float


def measure(sandbox: Sandbox, cold: Sandbox, starts: int = 30, cells: int = 500) -> list[Timing]:
    """Time starts and cells.

    Args:
        sandbox: One that keeps a session ready, as chats have it.
        cold: One that keeps none: each start is a whole one.
        starts: How many sessions are started in each.
        cells: How many cells are run of each kind.
    """

    def start(box: Sandbox) -> tuple[float, float]:
        began, spent = time.perf_counter(), time.process_time()
        with box.session() as session:
            assert session.run('1').ok
            took, own = time.perf_counter() - began, time.process_time() - spent
            return took, own + session.processor_seconds

    def ready() -> tuple[float, float]:
        time.sleep(0.25)  # a chat does not begin in the moment after another
        return start(sandbox)

    start(cold)  # the worker that its backend was tried with
    timings = [
        _timing('start, kept ready, to its first reply', starts, ready),
        _timing('start, from nothing, to its first reply', starts, lambda: start(cold)),
    ]
    with sandbox.session() as session:
        time.sleep(0.25)  # until another is ready
        for name, code in (('cell: pass', 'pass'), ('cell: 1 + 1, shown', '1 + 1')):

            def cell(code: str = code) -> tuple[float, float]:
                before = time.process_time() + session.processor_seconds
                began = time.perf_counter()
                session.run(code)
                took = time.perf_counter() - began
                return took, time.process_time() + session.processor_seconds - before

            timings.append(_timing(name, cells, cell))
    return timings


def load() -> str:
    """What else the machine does, for a line under the figures."""
    return f'{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}'


def _timing(name: str, count: int, once: Callable[[], tuple[float, float]]) -> Timing:
    walls, processor = zip(*[once() for _ in range(count)], strict=True)
    times = sorted(1000 * wall for wall in walls)
    high = times[math.ceil(0.95 * count) - 1]
    return Timing(name, count, statistics.median(times), high, 1000 * statistics.median(processor))
