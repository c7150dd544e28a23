"""Texts for requests, by whole models of which every process has one."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from internlm_mm.evaluation.requests import Generate
from internlm_mm.inference import Generator, Sampling


class TextWriter:
    """Answers `Generate` requests; processes share them out.

    Args:
        generator: The model of this process.
        batch_size: Prompts that are continued at once.
        rank: Of this process among all.
        world_size: How many processes there are.
    """

    def __init__(
        self, generator: Generator, *, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size < 1:
            raise ValueError(f'task_batch_size={batch_size} must be at least 1')
        self.generator, self.batch_size = generator, batch_size
        self.rank, self.world_size = rank, world_size

    def __call__(self, requests: Sequence[Generate]) -> list[str]:
        """Answer requests in their order. Collective: every process gives the same ones."""
        own: dict[int, str] = {}
        for indices, sampling in self._batches(requests)[self.rank :: self.world_size]:
            prompts = [requests[index].prompt.tolist() for index in indices]
            texts = self.generator.continue_ids(prompts, sampling)
            own |= dict(zip(indices, texts, strict=True))
        parts = [own]
        if self.world_size > 1:
            parts = [{} for _ in range(self.world_size)]
            dist.all_gather_object(parts, own)
        found = {index: text for part in parts for index, text in part.items()}
        return [found[index] for index in range(len(requests))]

    def _batches(self, requests: Sequence[Generate]) -> list[tuple[list[int], Sampling]]:
        """Prompts of like length, which need little padding, drawn alike; longest first."""
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt))
        groups: dict[Sampling, list[int]] = {}
        for index in order:
            groups.setdefault(requests[index].sampling, []).append(index)
        size = self.batch_size
        return [
            (indices[start : start + size], sampling)
            for sampling, indices in groups.items()
            for start in range(0, len(indices), size)
        ]
