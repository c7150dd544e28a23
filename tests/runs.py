"""Whole runs in processes of their own, started fast: imports are paid for once.

A server process imports everything and forks for each run, so a run begins in milliseconds.
"""

import gc
import importlib
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from internlm_mm.utils.launch import free_port

REPOSITORY = Path(__file__).parents[1]
FAULTY = REPOSITORY / 'tests' / 'configs' / 'faulty.py'


class Run:
    """One process that runs the training command line.

    Args:
        argv: Its arguments.
        log: File for what it prints.
        env: Additions to the environment.
        limit: Largest file that it may write, in bytes.
        prelude: Name of a function `module:name` to call first.
    """

    def __init__(
        self,
        argv: Sequence[object],
        log: Path,
        env: Mapping[str, object] | None = None,
        limit: int | None = None,
        prelude: str | None = None,
    ) -> None:
        self.log = log
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(
            ['internlm_mm.engine.train_cli', 'internlm_mm.engine.hooks', 'internlm_mm.models']
            + ['internlm_mm.datasets', 'internlm_mm.optim', 'tests.faults']
        )
        variables = {key: str(value) for key, value in (env or {}).items()}
        arguments = (list(map(str, argv)), str(log), variables, limit, prelude)
        before = os.environ.get('PYTHONPATH')
        # For the server, which starts with the first run.
        os.environ['PYTHONPATH'] = str(REPOSITORY)
        try:
            self.process: BaseProcess = context.Process(target=_run, args=arguments)
            self.process.start()
        finally:
            os.environ.pop('PYTHONPATH')
            if before is not None:
                os.environ['PYTHONPATH'] = before

    def wait(self, seconds: float = 120) -> int:
        """The exit code; minus the signal's number if one ended it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f'still running after {seconds} s:\n{self.text}')
        return self.process.exitcode

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text()


def train(argv: Sequence[object], log: Path, **options) -> tuple[int, str]:
    """Run to the end: exit code and output."""
    run = Run(argv, log, **options)
    return run.wait(), run.text


def start_ranks(
    argv: Sequence[object],
    log: Path,
    limits: Sequence[int | None] = (None, None),
    prelude: str | None = None,
) -> list[Run]:
    """The processes of one job, without a launcher that would watch over them.

    Args:
        argv: Arguments of all of them.
        log: Their outputs go to `log_RANK` beside it.
        limits: See `Run`, one for each process.
        prelude: See `Run`.
    """
    port = free_port()
    return [
        Run(
            [*argv, '--launcher', 'pytorch'],
            log.with_name(f'{log.name}_{rank}'),
            {
                'RANK': rank,
                'LOCAL_RANK': rank,
                'WORLD_SIZE': len(limits),
                'MASTER_ADDR': '127.0.0.1',
                'MASTER_PORT': port,
            },
            limit,
            prelude,
        )
        for rank, limit in enumerate(limits)
    ]


def _run(
    argv: list[str], log: str, env: dict[str, str], limit: int | None, prelude: str | None
) -> None:
    from internlm_mm.engine.train_cli import main  # here, for the server alone to pay for

    gc.freeze()  # what the server imported, which each search for garbage would copy
    multiprocessing.set_start_method('fork', force=True)  # as in a program started by hand
    os.setsid()  # a terminal's Ctrl-C reaches a group, and so do our tests
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(env)
    if prelude is not None:
        module, name = prelude.split(':')
        getattr(importlib.import_module(module), name)()
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write fails with EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(main(argv))
