"""A user's rows, shortened with their packing, of which unequal shares are trained."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np

from internlm_mm.datasets.packing import Row, pack_row
from internlm_mm.registry import DATASETS
from internlm_mm.structures import IGNORE_INDEX


@DATASETS.register_module()
class UnevenRows:
    """Rows of another dataset, cut down to `seq_len`, each trained up to another place.

    Every document of a row keeps its share of it, so a row of a hundred tokens has documents where
    the row of thousands had them; those that would be left with less than a token vanish. Of row i
    only the first tokens are trained, how many is a function of i: ranks and micro-batches then
    have unequal numbers of trained tokens, and a mean of means is not the mean. Where none of these
    has a loss, as at the beginning of a conversation, all of them get one.

    Args:
        dataset: A dataset or its config.
        seq_len: Length of a row, in tokens; at most that of `dataset`.
        seed: Given to `dataset` where it has none of its own.

    Raises:
        ValueError: If the rows are shorter than `seq_len`, or have pairs of answers.
    """

    def __init__(self, dataset: Any, *, seq_len: int, seed: int = 0) -> None:
        if isinstance(dataset, Mapping):
            dataset = DATASETS.build(dict(dataset), default_args={'seed': seed})
        if getattr(dataset, 'is_paired', False):
            raise ValueError(
                'rows of pairs of answers cannot be cut down: verify the layout with a config of '
                'the same model that has conversations or texts'
            )
        if seq_len > dataset.seq_len:
            raise ValueError(f'seq_len={seq_len}, but rows have {dataset.seq_len} tokens')
        self.dataset = dataset
        self.seq_len = seq_len
        self.seed = seed
        self.domains: Sequence[str] = getattr(dataset, 'domains', ())
        self.vocab_size: int | None = getattr(dataset, 'vocab_size', None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        """Row `index`; any index >= 0."""
        row = shortened(self.dataset[index], self.seq_len)
        labels = row.labels.copy()
        digest = sha256(f'{self.seed}/{index}'.encode()).digest()
        stop = 1 + int.from_bytes(digest[:4], 'big') % self.seq_len
        if (labels[:stop] == IGNORE_INDEX).all():
            labels[:-1] = row.input_ids[1:]
            labels[np.cumsum(row.lengths) - 1] = (
                IGNORE_INDEX  # predicts nothing of the next document
            )
        labels[stop:] = IGNORE_INDEX
        return replace(row, labels=labels)


def shortened(row: Row, seq_len: int) -> Row:
    """A row of `seq_len` tokens with the beginnings of the documents of a longer one.

    Args:
        row: At least `seq_len` tokens.
        seq_len: Length of the result, in tokens.
    """
    ends = np.cumsum(row.lengths)
    new_ends = ends * seq_len // len(row.input_ids)
    lengths = np.diff(new_ends, prepend=0)
    starts = ends - row.lengths
    kept = np.concatenate(
        [np.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)]
    ).astype(np.int64)
    return pack_row(
        row.input_ids[kept],
        row.labels[kept],
        lengths[lengths > 0],
        seq_len=seq_len,
        max_docs=min(row.max_docs, seq_len),
        domain_id=None if row.domain_ids is None else int(row.domain_ids[0]),
        num_domains=row.num_domains,
    )
