"""Rows of random tokens: for speed runs, which need neither a tokenizer nor files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from internlm_mm.datasets.packing import Row, pack_row
from internlm_mm.datasets.permutation import hash_key
from internlm_mm.registry import DATASETS
from internlm_mm.structures import IGNORE_INDEX


@DATASETS.register_module()
class RandomTokens:
    """Uniformly random tokens; row i is a function of (seed, i).

    Args:
        vocab_size: Tokens are in `range(vocab_size)`.
        seq_len: Length of a row, in tokens.
        document_lengths: Lengths, in tokens, from which each document's is drawn; the last of a row
            is cut at its end. None makes every row one document.
        num_rows: Rows an epoch.
        seed: Another seed, other rows.

    Raises:
        ValueError: If a size or a length is less than 1.
    """

    domains: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        vocab_size: int,
        seq_len: int,
        document_lengths: Sequence[int] | None = None,
        num_rows: int = 1_000_000,
        seed: int = 0,
    ) -> None:
        for name, value in dict(vocab_size=vocab_size, seq_len=seq_len, num_rows=num_rows).items():
            if value < 1:
                raise ValueError(f'{name} must be at least 1, got {value}')
        if document_lengths is not None and (not document_lengths or min(document_lengths) < 1):
            raise ValueError(
                f'document_lengths must be lengths of at least 1, got {document_lengths}'
            )
        self.vocab_size = vocab_size
        self.seq_len = seq_len
        self.document_lengths = document_lengths and np.asarray(document_lengths, np.int64)
        self.max_docs = 1 if document_lengths is None else -(-seq_len // min(document_lengths))
        self.num_rows = num_rows
        self.seed = seed

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> Row:
        """Row `index`; any index >= 0."""
        key = np.frombuffer(hash_key(self.seed, index)[:16], np.uint64)
        random = np.random.Generator(np.random.Philox(key=key))
        tokens = random.integers(self.vocab_size, size=self.seq_len + 1)
        labels = tokens[1:].copy()
        lengths = np.array([self.seq_len])
        if self.document_lengths is not None:
            ends = np.cumsum(random.choice(self.document_lengths, self.max_docs))
            ends = np.append(ends[ends < self.seq_len], self.seq_len)
            labels[ends[:-1] - 1] = IGNORE_INDEX
            lengths = np.diff(ends, prepend=0)
        return pack_row(tokens[:-1], labels, lengths, seq_len=self.seq_len, max_docs=self.max_docs)
