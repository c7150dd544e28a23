"""Processes that stay up and run functions together, so that a test need not start its own."""

import faulthandler
import gc
import multiprocessing
import pickle
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 120


def forking_context() -> Any:
    """Processes forked from one that has imported everything, which takes most of their time."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['internlm_mm.engine', 'internlm_mm.models', 'pytest'])
    return context


class EndedBySignal(RuntimeError):
    """A rank was ended by a signal."""


class Ranks:
    """A gloo group of processes on this machine.

    Called with a function of a test module and its arguments, which are pickled; every rank runs
    it, and what each returned comes back as a list.

    Once in some thousand calls a thread of gloo's (`pt_gloo_runloop`, torch 2.13) finds the heap
    damaged, and its process ends. A call whose rank was ended by a signal is made once more, by new
    ranks, and where its threads stood is printed. What ends a rank for a reason does so again.

    Args:
        folder: Where the processes meet.
        world_size: How many there are.
    """

    def __init__(self, folder: Path, world_size: int = 2) -> None:
        self._folder, self._world_size, self._starts = folder, world_size, 0
        self._pipes: list[Any] = []
        self._processes: list[Any] = []

    def __call__(self, function: Callable, *args: Any, **options: Any) -> list[Any]:
        try:
            return self._call(function, *args, **options)
        except EndedBySignal as error:
            print(f'{function.__name__} once more: {error}', file=sys.stderr)
            return self._call(function, *args, **options)

    def _call(self, function: Callable, *args: Any, **options: Any) -> list[Any]:
        if not self._processes:
            self._start()
        message = pickle.dumps((function, args, options))
        try:
            for pipe in self._pipes:
                pipe.send_bytes(message)
            answers = [self._answer(rank) for rank in range(self._world_size)]
        except BaseException:
            self.close()  # whoever asks next gets new ones
            raise
        failures = [f'rank {rank}:\n{text}' for rank, (text, _) in enumerate(answers) if text]
        if failures:
            raise RuntimeError('\n'.join(failures))
        return [result for _, result in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self._pipes, self._processes = [], []

    def _start(self) -> None:
        context = forking_context()
        self._starts += 1
        store = self._folder / f'store_{self._starts}'
        for rank in range(self._world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, self._world_size, str(store), theirs, str(self._stacks(rank)))
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def _answer(self, rank: int) -> tuple[str | None, Any]:
        if not self._pipes[rank].poll(SECONDS):
            raise TimeoutError(f'rank {rank} did not answer in {SECONDS} s')
        try:
            return pickle.loads(self._pipes[rank].recv_bytes())
        except EOFError:
            self._processes[rank].join(5)
            code = self._processes[rank].exitcode
            text = f'rank {rank} ended with exit code {code}'
            if code is not None and code < 0:
                raise EndedBySignal(f'{text}\n{self._stacks(rank).read_text()}') from None
            raise RuntimeError(text) from None

    def _stacks(self, rank: int) -> Path:
        return self._folder / f'store_{self._starts}_stacks_{rank}'


def _work(rank: int, world_size: int, store: str, pipe: Any, stacks: str) -> None:
    file = open(stacks, 'w')  # as long as the process lives
    faulthandler.enable(file)
    gc.freeze()  # what the server imported, which each search for garbage would copy
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo',
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=SECONDS / 2),
    )
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            break
        try:
            function, args, options = pickle.loads(message)
            answer = pickle.dumps((None, function(*args, **options)))
        except Exception:
            answer = pickle.dumps((traceback.format_exc(), None))
        pipe.send_bytes(answer)
    dist.destroy_process_group()
