"""Rows that are shortened with their packing and trained in part."""

import numpy as np
import pytest

from internlm_mm.datasets import RandomTokens, Row, collate_rows, pack_row
from internlm_mm.registry import DATASETS
from internlm_mm.structures import IGNORE_INDEX
from internlm_mm.verify.rows import UnevenRows, shortened

LONG = dict(type='RandomTokens', vocab_size=50, seq_len=400, document_lengths=[30, 90, 170])


def test_documents_keep_their_share_and_their_beginnings() -> None:
    row = DATASETS.build(LONG)[3]
    short = shortened(row, 40)
    assert len(short.input_ids) == short.lengths.sum() == 40
    ends, starts = np.cumsum(short.lengths), np.cumsum(row.lengths) - row.lengths
    np.testing.assert_allclose(ends, np.cumsum(row.lengths) / 10, atol=1)
    for length, end, start in zip(short.lengths, ends, starts, strict=True):
        where = slice(end - length, end)
        assert (short.input_ids[where] == row.input_ids[start : start + length]).all()
        assert (short.labels[where] == row.labels[start : start + length]).all()


def test_documents_of_less_than_a_token_vanish() -> None:
    row = RandomTokens(vocab_size=50, seq_len=400, document_lengths=[5])[0]
    short = shortened(row, 20)
    assert len(row.lengths) == 80 and len(short.lengths) == 20
    assert short.lengths.min() == 1 and short.max_docs == 20


def test_a_row_that_is_short_enough_is_left_alone() -> None:
    row = DATASETS.build(LONG)[0]
    same = shortened(row, 400)
    assert (same.input_ids == row.input_ids).all() and (same.labels == row.labels).all()
    assert (same.lengths == row.lengths).all()


@pytest.mark.parametrize('ranks', [2, 4])
def test_ranks_and_micro_batches_train_on_unequal_numbers(ranks: int) -> None:
    rows = UnevenRows(LONG, seq_len=32)
    for step in range(3):
        targets = [(rows[step * 16 + i].labels != IGNORE_INDEX).sum() for i in range(16)]
        shares = np.array(targets).reshape(ranks, -1).sum(1)
        assert len(set(shares)) == ranks
        micro = np.array(targets).reshape(-1, 2).sum(1)
        assert len(set(micro)) > 4


def test_rows_are_a_function_of_their_index() -> None:
    one, two = UnevenRows(LONG, seq_len=32, seed=3), UnevenRows(LONG, seq_len=32, seed=3)
    batch = collate_rows([one[5], one[6]])
    assert (batch.labels == collate_rows([two[5], two[6]]).labels).all()
    assert batch.num_targets > 0 and len(one) == len(one.dataset)
    assert (one.dataset.seed, one.vocab_size) == (3, 50)


def test_rows_whose_beginning_has_no_loss_get_one() -> None:
    class Conversations:
        seq_len, max_docs = 40, 3

        def __getitem__(self, index: int) -> Row:
            tokens = np.arange(1, 41) + index
            labels = np.append(tokens[1:], IGNORE_INDEX)
            labels[[*range(13), *range(19, 38)]] = IGNORE_INDEX
            return pack_row(tokens, labels, np.array([20, 20]), seq_len=40, max_docs=3)

    rows = UnevenRows(Conversations(), seq_len=20)
    for index in range(20):
        row = rows[index]
        learned = row.labels != IGNORE_INDEX
        stop = learned.sum() + (learned.sum() > 9)  # the end of the first document predicts nothing
        expected = np.append(row.input_ids[1:], IGNORE_INDEX)
        expected[9] = IGNORE_INDEX
        assert learned.any() and (row.labels[:stop] == expected[:stop]).all()
        assert not learned[stop:].any()


def test_rows_that_are_too_short() -> None:
    with pytest.raises(ValueError, match='seq_len=500, but rows have 400'):
        UnevenRows(LONG, seq_len=500)


def test_rows_of_pairs_stay_whole() -> None:
    class Pairs(RandomTokens):
        is_paired = True

    with pytest.raises(ValueError, match='rows of pairs of answers cannot be cut down'):
        UnevenRows(Pairs(vocab_size=9, seq_len=20), seq_len=10)
