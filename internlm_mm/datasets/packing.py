"""Fragments of documents -> a row of fixed length -> a batch of fixed shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from internlm_mm.structures import IGNORE_INDEX, Batch

PADDING_ID = 0
"""Token at a position that nothing sees and nothing trains on; any id would do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a batch.

    Attributes:
        input_ids: Tokens, [seq], int64.
        labels: Next token inside the same document or `IGNORE_INDEX`, [seq], int64.
        lengths: Tokens of each document in the row, in order, padding being the last of them,
            [documents], int64; they sum to seq.
        max_docs: Most documents any row of the dataset can hold; the same for all its rows.
        domain_ids: Data domain of each token, [seq], int64; None when domains are not told apart.
        num_domains: How many domains there are; 0 when `domain_ids` is None.
        num_pairs: How many pairs of answers the documents are, a chosen one and a rejected one next
            to each other; None where they are no pairs.
        references: Log-probability of each document under another model, [max_docs], float32; None
            when it is not known.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    max_docs: int
    domain_ids: np.ndarray | None = None
    num_domains: int = 0
    num_pairs: int | None = None
    references: np.ndarray | None = None


def pack_row(
    tokens: np.ndarray,
    labels: np.ndarray,
    lengths: np.ndarray,
    *,
    seq_len: int,
    max_docs: int,
    domain_id: int | None = None,
    num_domains: int = 0,
) -> Row:
    """Put documents that lie end to end into a row, and padding behind them if they do not fill it.

    Args:
        tokens: Tokens of all fragments, [tokens] with tokens <= seq_len.
        labels: Their labels, [tokens].
        lengths: Tokens of each fragment, [fragments].
        seq_len: Length of the row, in tokens.
        max_docs: Most documents a row of this dataset can hold, padding included.
        domain_id: Domain of every token of the row.
        num_domains: How many domains there are, if `domain_id` is given.

    Raises:
        ValueError: If there are more fragments than `max_docs`.
    """
    padding = seq_len - len(tokens)
    assert padding >= 0 and len(labels) == len(tokens) == lengths.sum()
    if padding:
        tokens = np.concatenate([tokens, np.full(padding, PADDING_ID)])
        labels = np.concatenate([labels, np.full(padding, IGNORE_INDEX)])
        lengths = np.append(lengths, padding)
    if len(lengths) > max_docs:
        raise ValueError(
            f'a row of {seq_len} tokens holds {len(lengths)} documents, more than the '
            f'{max_docs} the dataset allows; raise max_docs or min_document_length'
        )
    return Row(
        input_ids=np.asarray(tokens, np.int64),
        labels=np.asarray(labels, np.int64),
        lengths=np.asarray(lengths, np.int64),
        max_docs=max_docs,
        domain_ids=None if domain_id is None else np.full(seq_len, domain_id),
        num_domains=0 if domain_id is None else num_domains,
    )


def untrained_row(row: Row) -> Row:
    """The same row with no label left: it fills a batch up and counts for nothing."""
    return replace(
        row,
        labels=np.full_like(row.labels, IGNORE_INDEX),
        num_pairs=None if row.num_pairs is None else 0,
    )


def collate_rows(rows: Sequence[Row]) -> Batch:
    """Stack rows of one dataset.

    Where every row is one document the batch is dense: two columns of `cu_seqlens`, and attention
    needs no mask but the causal one. Otherwise there are `max_docs + 1` columns in every batch of
    the dataset, so that compiled code sees two shapes at most.

    Args:
        rows: At least one; all of the same length.
    """
    seq_len = len(rows[0].input_ids)
    dense = all(len(row.lengths) == 1 for row in rows)
    columns = 1 if dense else rows[0].max_docs
    cu_seqlens = np.full((len(rows), columns + 1), seq_len, np.int32)
    cu_seqlens[:, 0] = 0
    position_ids = np.empty((len(rows), seq_len), np.int64)
    document_ids = np.empty((len(rows), seq_len), np.int32)
    for index, row in enumerate(rows):
        count = len(row.lengths)
        ends = np.cumsum(row.lengths)
        cu_seqlens[index, 1 : count + 1] = ends
        position_ids[index] = np.arange(seq_len) - np.repeat(ends - row.lengths, row.lengths)
        document_ids[index] = np.repeat(np.arange(count), row.lengths)
    labels = np.stack([row.labels for row in rows])
    domains = [row.domain_ids for row in rows if row.domain_ids is not None]
    assert len(domains) in (0, len(rows)), 'rows with and without domains in one batch'
    pairs = [row.num_pairs for row in rows if row.num_pairs is not None]
    assert len(pairs) in (0, len(rows)), 'rows with and without pairs in one batch'
    references = [row.references for row in rows if row.references is not None]
    assert len(references) in (0, len(rows)), 'rows with and without references in one batch'
    return Batch(
        input_ids=torch.from_numpy(np.stack([row.input_ids for row in rows])),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        document_ids=torch.from_numpy(document_ids),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=max(int(row.lengths.max()) for row in rows),
        num_targets=sum(pairs) if pairs else int((labels != IGNORE_INDEX).sum()),
        domain_ids=torch.from_numpy(np.stack(domains)) if domains else None,
        num_domains=rows[0].num_domains,
        is_paired=bool(pairs),
        references=torch.from_numpy(np.stack(references)) if references else None,
    )
