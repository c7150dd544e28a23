"""Work outside the model, shared out over processes and threads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from internlm_mm.evaluation.requests import Outside

_MOST_THREADS = 8


class OutsideWorker:
    """Answers `Outside` requests; processes share them out.

    Args:
        rank: Of this process among all.
        world_size: How many processes there are.
        threads: How much is done at once in a process; by default as there are processors for
            it, 8 at most.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, threads: int | None = None) -> None:
        self.rank, self.world_size = rank, world_size
        self.threads = threads or max(1, min(_MOST_THREADS, os.cpu_count() or 1))

    def __call__(self, requests: Sequence[Outside]) -> list[Any]:
        """Answer requests in their order. Collective: every process gives the same ones.

        Raises:
            RuntimeError: In every process, if some work raised in one.
        """
        groups: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            if request.owner % self.world_size == self.rank:
                groups.setdefault(request.owner, []).append(index)

        def work(indices: list[int]) -> dict[int, tuple[bool, Any]]:
            return {index: _done(requests[index]) for index in indices}

        own: dict[int, tuple[bool, Any]] = {}
        with ThreadPoolExecutor(self.threads, 'outside') as pool:
            for part in pool.map(work, groups.values()):
                own |= part
        parts = [own]
        if self.world_size > 1:
            parts = [{} for _ in range(self.world_size)]
            dist.all_gather_object(parts, own)
        found = {index: outcome for part in parts for index, outcome in part.items()}
        for index in range(len(requests)):
            done, value = found[index]
            if not done:
                raise RuntimeError(f'work outside the model failed: {value}')
        return [found[index][1] for index in range(len(requests))]


def _done(request: Outside) -> tuple[bool, Any]:
    try:
        return True, request.work()
    except Exception as error:  # told to all processes, which would wait for this one otherwise
        return False, f'{type(error).__name__}: {error}'
