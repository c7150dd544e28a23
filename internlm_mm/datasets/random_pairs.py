"""Rows of random pairs of answers: for speed runs of objectives that compare them."""

from __future__ import annotations

from dataclasses import replace

from internlm_mm.datasets.packing import Row
from internlm_mm.datasets.random_tokens import RandomTokens
from internlm_mm.registry import DATASETS
from internlm_mm.structures import IGNORE_INDEX


@DATASETS.register_module()
class RandomPairs(RandomTokens):
    """Pairs of documents of random tokens, as a `PreferenceDataset` has them; all of one length.

    Args:
        vocab_size: Tokens are in `range(vocab_size)`.
        seq_len: Length of a row, in tokens: a multiple of two documents.
        document_length: Tokens of a prompt and an answer; half a row if None.
        answer_length: Tokens of an answer; half a document if None.
        num_rows: Rows an epoch.
        seed: Another seed, other rows.

    Raises:
        ValueError: If a size is less than 1, or lengths do not fit into one another.
    """

    is_paired = True

    def __init__(
        self,
        *,
        vocab_size: int,
        seq_len: int,
        document_length: int | None = None,
        answer_length: int | None = None,
        num_rows: int = 1_000_000,
        seed: int = 0,
    ) -> None:
        length = seq_len // 2 if document_length is None else document_length
        answer = length // 2 if answer_length is None else answer_length
        if length < 2 or seq_len % (2 * length):
            raise ValueError(
                f'seq_len={seq_len} is no multiple of 2 * document_length={2 * length}'
            )
        if not 1 <= answer < length:
            raise ValueError(f'answer_length={answer} is not in [1, {length}), a document')
        super().__init__(
            vocab_size=vocab_size,
            seq_len=seq_len,
            document_lengths=[length],
            num_rows=num_rows,
            seed=seed,
        )
        self.answer_length = answer

    def __getitem__(self, index: int) -> Row:
        """Row `index`; any index >= 0."""
        row = super().__getitem__(index)
        labels = row.labels.reshape(len(row.lengths), -1).copy()
        labels[:, : labels.shape[1] - 1 - self.answer_length] = IGNORE_INDEX
        labels[:, -1] = IGNORE_INDEX
        return replace(row, labels=labels.reshape(-1), num_pairs=len(row.lengths) // 2)
