import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from internlm_mm.datasets.packing import PADDING_ID, Row, collate_rows, pack_row, untrained_row
from internlm_mm.structures import IGNORE_INDEX

SEQ = 12


def row_of(lengths: list[int], max_docs: int = 8, domain: int | None = None) -> Row:
    """Documents of these lengths, tokens counted from 1."""
    total = sum(lengths)
    tokens = np.arange(1, total + 1)
    labels = tokens + 1
    labels[np.cumsum(lengths) - 1] = IGNORE_INDEX
    return pack_row(
        tokens,
        labels,
        np.array(lengths),
        seq_len=SEQ,
        max_docs=max_docs,
        domain_id=domain,
        num_domains=3,
    )


@st.composite
def lengths_of_a_row(draw) -> list[int]:
    lengths: list[int] = []
    while sum(lengths) < SEQ and len(lengths) < 7 and (not lengths or draw(st.booleans())):
        lengths.append(draw(st.integers(1, SEQ - sum(lengths))))
    return lengths


@given(st.lists(lengths_of_a_row(), min_size=1, max_size=4))
def test_batch_says_where_documents_are(rows: list[list[int]]) -> None:
    batch = collate_rows([row_of(lengths) for lengths in rows])
    full = [[*lengths, SEQ - sum(lengths)] if sum(lengths) < SEQ else lengths for lengths in rows]
    dense = all(len(lengths) == 1 for lengths in full)
    assert batch.cu_seqlens.shape == (len(rows), 2 if dense else 9)
    assert batch.max_seqlen == max(max(lengths) for lengths in full)
    for index, lengths in enumerate(full):
        ids = [document for document, n in enumerate(lengths) for _ in range(n)]
        assert batch.document_ids[index].tolist() == ids
        assert batch.position_ids[index].tolist() == [p for n in lengths for p in range(n)]
        ends = batch.cu_seqlens[index].tolist()
        assert ends[0] == 0
        assert ends[1 : len(lengths) + 1] == np.cumsum(lengths).tolist()
        assert set(ends[len(lengths) :]) == {SEQ}
    assert batch.num_targets == sum(n - 1 for lengths in rows for n in lengths)
    assert batch.num_targets == int((batch.labels != IGNORE_INDEX).sum())
    assert batch.num_tokens == len(rows) * SEQ


def test_fields_have_the_promised_types() -> None:
    batch = collate_rows([row_of([5, 7], domain=2)])
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert batch.document_ids.dtype == batch.cu_seqlens.dtype == torch.int32
    assert batch.domain_ids is not None
    assert batch.domain_ids.tolist() == [[2] * SEQ]
    assert batch.num_domains == 3


def test_padding_is_a_document_without_labels() -> None:
    row = row_of([4])
    assert row.lengths.tolist() == [4, 8]
    assert row.input_ids.tolist() == [1, 2, 3, 4] + [PADDING_ID] * 8
    assert row.labels.tolist() == [2, 3, 4] + [IGNORE_INDEX] * 9


def test_without_domains() -> None:
    batch = collate_rows([row_of([12])])
    assert batch.domain_ids is None
    assert batch.num_domains == 0


def test_more_documents_than_allowed() -> None:
    row_of([3, 3, 6], max_docs=3)
    with pytest.raises(ValueError, match=r'holds 4 documents, more than the 3 .* max_docs'):
        row_of([3, 3, 3], max_docs=3)


def test_untrained_row_counts_for_nothing() -> None:
    row = row_of([5, 7], domain=1)
    batch = collate_rows([row, untrained_row(row)])
    assert batch.num_targets == collate_rows([row]).num_targets
    assert torch.equal(batch.cu_seqlens[0], batch.cu_seqlens[1])
