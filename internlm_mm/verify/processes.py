"""Start the processes of a layout, fast, and end all of them when one fails."""

import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from internlm_mm.utils.launch import free_port
from internlm_mm.verify.worker import REFUSED, work

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


def run_processes(
    job: Path, world_size: int, device: str, prelude: str | None = None, timeout: float = 600
) -> None:
    """Run a job on `world_size` processes of this machine and wait for it.

    Args:
        job: A JSON file with tasks; logs go beside it. See `internlm_mm.verify.worker`.
        world_size: How many processes.
        device: 'cpu' or 'cuda'.
        prelude: See `internlm_mm.verify.worker.work`.
        timeout: Seconds after which all are ended.

    Raises:
        LayoutRefusedError: If the strategy refuses the layout.
        LayoutError: If one fails or they take too long. All are ended by then.
    """
    # A process that was forked may not use CUDA once the imports of the server have looked for it.
    context: Any = multiprocessing.get_context('spawn' if device == 'cuda' else 'forkserver')
    if device != 'cuda':
        context.set_forkserver_preload(list(PRELOADED))
    port = free_port()
    logs = [job.with_name(f'log_{rank}.txt') for rank in range(world_size)]
    processes = [
        context.Process(
            target=work, args=(rank, world_size, port, device, str(job), str(logs[rank]), prelude)
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        failed = _first_failure(processes, timeout)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    if failed is None:
        return
    if failed < 0:
        raise LayoutError(f'not finished after {timeout:.0f} s\n{tail(logs[0])}')
    code = processes[failed].exitcode
    if code == REFUSED:
        raise LayoutRefusedError(tail(logs[failed], lines=1))
    raise LayoutError(f'rank {failed} ended with code {code}\n{tail(logs[failed])}')


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
