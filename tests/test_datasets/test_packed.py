import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from internlm_mm.datasets import TokenFileWriter
from internlm_mm.datasets.bins import in_sequence
from internlm_mm.datasets.packed import PackedRows, check_packing
from internlm_mm.datasets.token_file import TokenFile
from internlm_mm.structures import IGNORE_INDEX

DOMAINS = some.lists(
    some.lists(some.integers(2, 30), min_size=1, max_size=15), min_size=1, max_size=3
)  # lengths of documents


def write(root, domains: list[list[int]]) -> tuple[dict[str, TokenFile], dict[int, list[int]]]:
    """Each token its own id, every third without a loss; and the documents by their first token."""
    files, documents, next_id = {}, {}, 1
    for index, lengths in enumerate(domains):
        path = root / f'd{index}'
        with TokenFileWriter(path, vocab_size=60_000, has_loss_mask=True) as writer:
            for length in lengths:
                ids = np.arange(next_id, next_id + length)
                documents[next_id] = ids.tolist()
                writer.add(ids, ids % 3 != 0)
                next_id += length
        files[f'd{index}'] = TokenFile(path)
    return files, documents


@given(DOMAINS, some.integers(30, 50), some.sampled_from(['best_fit', 'documents', None]))
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_an_epoch_has_every_token_once(tmp_path_factory, domains, seq_len, packing) -> None:
    files, documents = write(tmp_path_factory.mktemp('data'), domains)
    rows = PackedRows(files, seq_len=seq_len, packing=packing, seed=5)
    document_of = {token: start for start, tokens in documents.items() for token in tokens}
    for epoch in range(2):
        seen, targets, padding = [], [], 0
        for index in range(epoch * len(rows), (epoch + 1) * len(rows)):
            row = rows[index]
            assert len(row.input_ids) == seq_len == row.lengths.sum()
            assert len(row.lengths) <= row.max_docs == rows.max_docs
            for tokens in np.split(row.input_ids, np.cumsum(row.lengths)[:-1]):
                ids = tokens.tolist()
                if not any(ids):
                    padding += len(ids)
                    continue
                seen += ids
                assert {document_of[token] for token in ids} == {document_of[ids[0]]}
                if packing != 'documents':
                    assert ids == documents[ids[0]]
            learned = row.labels != IGNORE_INDEX
            assert (row.labels[learned] == row.input_ids[learned] + 1).all()
            targets += row.labels[learned].tolist()
        assert sorted(seen) == sorted(document_of)
        expected = [t for start, tokens in documents.items() for t in tokens[1:] if t % 3]
        assert sorted(targets) == sorted(expected)
        assert rows.waste == pytest.approx(padding / (len(rows) * seq_len))


@given(DOMAINS, some.integers(30, 50))
@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_best_fit_wastes_no_more_than_the_sequence(tmp_path_factory, domains, seq_len) -> None:
    files, _ = write(tmp_path_factory.mktemp('data'), domains)
    rows = PackedRows(files, seq_len=seq_len, packing='best_fit')
    whole = sum(len(in_sequence(np.array(lengths), seq_len)) for lengths in domains)
    total = sum(map(sum, domains))
    assert rows.waste <= 1 - total / (whole * seq_len) + 1e-12
    assert PackedRows(files, seq_len=seq_len, packing='documents').waste <= rows.waste + 1e-12
    assert rows.waste <= PackedRows(files, seq_len=seq_len, packing=None).waste + 1e-12


def test_order_and_weights(tmp_path) -> None:
    files, _ = write(tmp_path, [[10] * 6, [20] * 4])
    still = PackedRows(files, seq_len=20, shuffle=False)
    assert [still.locate(i) for i in range(8)] == [
        *((0, row) for row in range(3)),
        *((1, row) for row in range(4)),
        (0, 0),
    ]
    mixed = PackedRows(files, seq_len=20, weights={'d1': 1.0})
    assert mixed.domains == ['d1'] and len(mixed) == 4
    with pytest.raises(ValueError, match=r"weights names an unknown domain 'd3'\. Did you mean"):
        PackedRows(files, seq_len=20, weights={'d3': 1.0})


def test_what_does_not_fit(tmp_path) -> None:
    files, _ = write(tmp_path, [[5, 31]])
    with pytest.raises(ValueError, match='document 1 has 31 tokens, more than the 30 of a row of'):
        PackedRows(files, seq_len=30)
    assert len(PackedRows(files, seq_len=30, packing='documents')) == 2
    with pytest.raises(ValueError, match=r"packing='bestfit' is none of .* mean 'best_fit'\?"):
        check_packing('bestfit', 30)
    with pytest.raises(ValueError, match='seq_len must be at least 2, got 1'):
        check_packing(None, 1)
