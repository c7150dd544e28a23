"""Start the processes of a layout, fast, and end all of them when one fails."""

import json
import multiprocessing
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from internlm_mm.utils.launch import free_port
from internlm_mm.verify.worker import REFUSED, wait_for_job

AHEAD = 2
"""Layouts whose processes are started while another runs, where each has to import by itself."""

PRELOADED = (
    'internlm_mm.verify.worker',
    'internlm_mm.models',
    'internlm_mm.datasets',
    'internlm_mm.optim',
    'internlm_mm.parallel',
    'internlm_mm.engine.hooks',
    'internlm_mm.verify',
)
"""What a server imports once; every process is forked from it and begins in milliseconds."""


class LayoutError(RuntimeError):
    """A process of a layout failed; the message ends with its traceback."""


class LayoutRefusedError(LayoutError):
    """The strategy refused the layout; the message is its reason."""


class Waiting(NamedTuple):
    """A process that has no job yet, and the way to give it one."""

    process: Any
    connection: Connection


class Processes:
    """Starts processes for one layout after another, some of them before their turn.

    Where GPUs are used a process imports everything by itself, for seconds; that it does while
    layouts before it run.

    Args:
        sizes: How many processes the layouts need, in their order.
        device: 'cpu' or 'cuda'.
        prelude: See `internlm_mm.verify.worker.work`.
        ahead: Layouts whose processes wait at a time; by default `AHEAD` with GPUs, else 0.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        device: str,
        prelude: str | None = None,
        ahead: int | None = None,
    ) -> None:
        self._device, self._prelude = device, prelude
        self._ahead = (AHEAD if device == 'cuda' else 0) if ahead is None else ahead
        self._coming = deque(sizes)
        self._ready: deque[list[Waiting]] = deque()

    def take(self, world_size: int) -> list[Waiting]:
        """Processes for the layout whose turn it is; start those of the next ones."""
        found = None
        while self._ready and found is None:
            first = self._ready.popleft()
            if len(first) == world_size:
                found = first
            else:  # a layout was left out
                _end([one.process for one in first])
        if found is None:
            if self._coming:
                self._coming.popleft()
            found = self._start(world_size)
        while self._coming and len(self._ready) < self._ahead:
            self._ready.append(self._start(self._coming.popleft()))
        return found

    def close(self) -> None:
        """End those that nobody took."""
        for waiting in self._ready:
            _end([one.process for one in waiting])
        self._ready.clear()

    def _start(self, world_size: int) -> list[Waiting]:
        # A process that was forked may not use CUDA once the imports of the server have looked
        # for it.
        method = 'spawn' if self._device == 'cuda' else 'forkserver'
        context: Any = multiprocessing.get_context(method)
        if method == 'forkserver':
            context.set_forkserver_preload(list(PRELOADED))
        found = []
        for rank in range(world_size):
            theirs, ours = context.Pipe(duplex=False)
            process = context.Process(
                target=wait_for_job, args=(theirs, rank, world_size, self._device, self._prelude)
            )
            process.start()
            theirs.close()
            found.append(Waiting(process, ours))
        return found


def run_processes(job: Path, waiting: Sequence[Waiting], timeout: float = 600) -> None:
    """Run a job on processes of this machine and wait for it.

    Args:
        job: A JSON file with tasks; logs go beside it. See `internlm_mm.verify.worker`.
        waiting: Processes, by rank.
        timeout: Seconds after which all are ended.

    Raises:
        LayoutRefusedError: If the strategy refuses the layout.
        LayoutError: If one fails or they take too long. All are ended by then.
    """
    port = free_port()
    logs = [job.with_name(f'log_{rank}.txt') for rank in range(len(waiting))]
    processes = [one.process for one in waiting]
    try:
        for one, log in zip(waiting, logs, strict=True):
            told = {'port': port, 'job': str(job), 'log': str(log)}
            one.connection.send_bytes(json.dumps(told).encode())
        failed = _first_failure(processes, timeout)
    finally:
        _end(processes)
    if failed is None:
        return
    if failed < 0:
        raise LayoutError(f'not finished after {timeout:.0f} s\n{tail(logs[0])}')
    code = processes[failed].exitcode
    if code == REFUSED:
        raise LayoutRefusedError(tail(logs[failed], lines=1))
    raise LayoutError(f'rank {failed} ended with code {code}\n{tail(logs[failed])}')


def _end(processes: Sequence[Any]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


def _first_failure(processes: Sequence, timeout: float) -> int | None:
    """The first rank that fails, -1 if time runs out, or None when all have succeeded."""
    deadline = time.monotonic() + timeout
    running = {process.sentinel: rank for rank, process in enumerate(processes)}
    while running:
        ended = wait(list(running), max(deadline - time.monotonic(), 0.0))
        if not ended:
            return -1
        for sentinel in ended:
            rank = running.pop(sentinel)
            processes[rank].join()
            if processes[rank].exitcode != 0:
                return rank
    return None


def tail(log: Path, lines: int = 12) -> str:
    """The last lines of a log."""
    text = log.read_text(errors='replace') if log.exists() else ''
    return '\n'.join(text.rstrip().splitlines()[-lines:])
