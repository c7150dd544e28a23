"""Log-probabilities of continuations, by the model as it is laid out for training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from internlm_mm.datasets.bins import best_fit, one_each
from internlm_mm.datasets.packing import Row, collate_rows, pack_row, untrained_row
from internlm_mm.evaluation.requests import LogProb, LogProbAnswer
from internlm_mm.structures import IGNORE_INDEX, Batch

LEAST_ROW = 512
"""Tokens of a row at least, where the model reads as many: short requests share one."""

_STEP = 64  # rows are as long as some multiple of it, so that few shapes are seen


class LogProbScorer:
    """Answers `LogProb` requests with the forward pass that training has.

    Requests are documents of packed rows, and each is a domain of its own: a model in evaluation
    mode sums losses by domain, over whatever ranks share tokens, layers or vocabulary, and the
    loss of a domain is minus the log-probability of its continuation.

    Args:
        evaluate: Sums over all ranks of what the model returns for one micro-batch a rank;
            `HybridParallelStrategy.evaluate`. Collective.
        max_seq_len: Tokens of a row at most.
        batch_size: Rows of one forward on one rank.
        data_rank: This rank among those that read different rows.
        data_world_size: How many such ranks there are.
        multiple: What the length of a row must be divisible by.
        one_each: Whether a row may hold one request only.

    Raises:
        ValueError: If no row can be as long as `multiple` asks.
    """

    def __init__(
        self,
        evaluate: Callable[[Sequence[Batch]], dict[str, torch.Tensor]],
        *,
        max_seq_len: int,
        batch_size: int,
        data_rank: int = 0,
        data_world_size: int = 1,
        multiple: int = 1,
        one_each: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f'task_batch_size={batch_size} must be at least 1')
        self.evaluate = evaluate
        self.longest = max_seq_len // multiple * multiple
        if not self.longest:
            raise ValueError(f'max_seq_len={max_seq_len} is shorter than {multiple} tokens')
        self.batch_size = batch_size
        self.data_rank, self.data_world_size = data_rank, data_world_size
        self.multiple, self.one_each = multiple, one_each

    def __call__(self, requests: Sequence[LogProb]) -> list[LogProbAnswer]:
        """Answer requests in their order. Collective: every rank gives the same ones."""
        if not requests:
            return []
        lengths = np.array([request.num_tokens for request in requests])
        seq_len = self._row_length(int(lengths.max()))
        bins = (one_each if self.one_each else best_fit)(lengths, seq_len)
        losses = np.zeros(len(requests))
        right = np.zeros(len(requests))
        step = self.batch_size * self.data_world_size
        for start in range(0, len(bins), step):
            rows = [bins.row(index) for index in range(start, min(start + step, len(bins)))]
            sums = self.evaluate([self._batch(requests, rows, seq_len, bins.most)])
            self._check(sums)
            for place, indices in enumerate(rows):
                slots = place * bins.most + np.arange(len(indices))
                losses[indices] = sums['domain_loss'].cpu().double().numpy()[slots]
                right[indices] = sums['domain_correct'].cpu().double().numpy()[slots]
        counts = [len(request.continuation) for request in requests]
        return [
            LogProbAnswer(-loss, count, round(found) == count)
            for loss, found, count in zip(losses.tolist(), right.tolist(), counts, strict=True)
        ]

    def _row_length(self, longest: int) -> int:
        if longest > self.longest:
            raise ValueError(
                f'a prompt with its continuation has {longest} tokens, rows have {self.longest}'
            )
        unit = math.lcm(_STEP, self.multiple)
        return min(-(-max(longest, LEAST_ROW) // unit) * unit, self.longest)

    def _batch(
        self, requests: Sequence[LogProb], rows: Sequence[np.ndarray], seq_len: int, most: int
    ) -> Batch:
        """This rank's share of a step's rows, filled up with rows that count for nothing."""
        first = self.data_rank * self.batch_size
        domains = self.batch_size * self.data_world_size * most
        made = [
            self._row(requests, rows[place], place, seq_len, most, domains)
            for place in range(first, min(first + self.batch_size, len(rows)))
        ]
        while len(made) < self.batch_size:
            example = made[0] if made else self._row(requests, rows[0], 0, seq_len, most, domains)
            made.append(untrained_row(example))
        return collate_rows(made)

    def _row(
        self,
        requests: Sequence[LogProb],
        indices: np.ndarray,
        place: int,
        seq_len: int,
        most: int,
        domains: int,
    ) -> Row:
        tokens, labels, lengths, slots = [], [], [], []
        for order, index in enumerate(indices.tolist()):
            prompt, continuation = requests[index].prompt, requests[index].continuation
            tokens += [prompt, continuation[:-1]]
            labels += [np.full(len(prompt) - 1, IGNORE_INDEX), continuation]
            lengths.append(requests[index].num_tokens)
            slots.append(np.full(lengths[-1], place * most + order))
        used = sum(lengths)
        if self.one_each and used < seq_len:  # padding behind a causal document changes nothing
            padding = seq_len - used
            tokens.append(np.zeros(padding, np.int32))
            labels.append(np.full(padding, IGNORE_INDEX))
            lengths[-1] += padding
        row = pack_row(
            np.concatenate(tokens),
            np.concatenate(labels),
            np.array(lengths),
            seq_len=seq_len,
            max_docs=most + (not self.one_each),
            domain_id=0,
            num_domains=domains,
        )
        assert row.domain_ids is not None
        row.domain_ids[:used] = np.concatenate(slots)
        return row

    def _check(self, sums: dict[str, Any]) -> None:
        for key in ('domain_loss', 'domain_correct'):
            if key not in sums:
                raise ValueError(
                    f"the model's objective sums no {key!r} in evaluation, which tasks that "
                    'compare log-probabilities need: objective=dict(type=NextToken)'
                )
