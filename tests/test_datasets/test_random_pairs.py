"""Random pairs against what a pair is: two documents, labels on their last tokens alone."""

import pytest

from internlm_mm.datasets import RandomPairs, collate_rows
from internlm_mm.models import InternLM
from internlm_mm.structures import IGNORE_INDEX
from tests.test_models.helpers import SIZES


def test_pairs_by_hand() -> None:
    rows = RandomPairs(vocab_size=128, seq_len=32, document_length=8, answer_length=3)
    batch = collate_rows([rows[0], rows[5]])
    assert batch.num_targets == 4 and batch.is_paired
    assert batch.cu_seqlens.tolist() == [[0, 8, 16, 24, 32]] * 2
    for row in range(2):
        for start in range(0, 32, 8):
            ids, labels = (x[row, start : start + 8] for x in (batch.input_ids, batch.labels))
            assert labels[4:7].tolist() == ids[5:8].tolist()
            assert (labels[:4] == IGNORE_INDEX).all() and labels[7] == IGNORE_INDEX
    found = InternLM(**SIZES, objective=dict(type='SimPO'))(batch)
    assert found['loss'] > 0 and found['rewards/chosen'] < 0


def test_half_a_row_by_default() -> None:
    row = RandomPairs(vocab_size=9, seq_len=40)[7]
    assert row.lengths.tolist() == [20, 20] and row.num_pairs == 1
    assert (row.labels != IGNORE_INDEX).sum() == 20


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(seq_len=30, document_length=8), r'seq_len=30 is no multiple .*=16'),
        (dict(seq_len=32, document_length=8, answer_length=8), r'answer_length=8 is not in \[1, 8'),
        (dict(seq_len=3), 'no multiple'),
    ],
)
def test_lengths_that_do_not_fit(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        RandomPairs(vocab_size=9, **options)
