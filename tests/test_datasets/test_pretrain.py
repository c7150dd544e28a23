from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from internlm_mm.datasets import PretrainDataset, TokenFileWriter, collate_rows
from internlm_mm.datasets.pretrain import find_token_files
from internlm_mm.registry import DATASETS
from internlm_mm.structures import IGNORE_INDEX

DOMAINS = st.lists(
    st.lists(st.integers(1, 30), min_size=1, max_size=15), min_size=1, max_size=3
)  # lengths of documents


def write(root: Path, domains: list[list[int]]) -> dict[int, list[int]]:
    """A folder a domain, each token its own id; returns the documents by their first token."""
    documents, next_id = {}, 1
    for index, lengths in enumerate(domains):
        with TokenFileWriter(root / f'd{index}', vocab_size=60_000, overwrite=True) as writer:
            for length in lengths:
                documents[next_id] = list(range(next_id, next_id + length))
                writer.add(documents[next_id])
                next_id += length
    return documents


@given(DOMAINS, st.integers(1, 40), st.booleans(), st.integers(0, 3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_an_epoch_has_every_token_once_and_mixes_no_documents(
    tmp_path_factory: pytest.TempPathFactory,
    domains: list[list[int]],
    seq_len: int,
    shuffle: bool,
    epoch: int,
) -> None:
    root = tmp_path_factory.mktemp('data')
    documents = write(root, domains)
    document_of = {t: start for start, tokens in documents.items() for t in tokens}
    dataset = PretrainDataset(root, seq_len=seq_len, shuffle=shuffle)
    seen: list[int] = []
    for index in range(epoch * len(dataset), (epoch + 1) * len(dataset)):
        row = dataset[index]
        assert len(row.input_ids) == seq_len == row.lengths.sum()
        assert row.domain_ids is not None
        begin = 0
        for length in row.lengths:
            tokens = row.input_ids[begin : begin + length].tolist()
            labels = row.labels[begin : begin + length].tolist()
            begin += length
            if not any(tokens):  # padding
                assert set(labels) == {IGNORE_INDEX}
                continue
            seen += tokens
            start = document_of[tokens[0]]
            assert {document_of[token] for token in tokens} == {start}
            # Ids count up, so the next token of a document is the id plus one.
            last = documents[start][-1]
            assert labels == [IGNORE_INDEX if token == last else token + 1 for token in tokens]
    assert sorted(seen) == sorted(document_of)


@given(DOMAINS, st.integers(1, 40), st.integers(1, 12))
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30
)
def test_short_documents_are_dropped(
    tmp_path_factory: pytest.TempPathFactory,
    domains: list[list[int]],
    seq_len: int,
    min_length: int,
) -> None:
    root = tmp_path_factory.mktemp('data')
    documents = write(root, domains)
    if any(max(lengths) < min_length for lengths in domains):
        with pytest.raises(ValueError, match=f'min_document_length={min_length}'):
            PretrainDataset(root, seq_len=seq_len, min_document_length=min_length)
        return
    dataset = PretrainDataset(root, seq_len=seq_len, min_document_length=min_length)
    rows = [dataset[index] for index in range(len(dataset))]
    seen = sorted(t for row in rows for t in row.input_ids.tolist() if t)
    kept = [tokens for tokens in documents.values() if len(tokens) >= min_length]
    assert seen == [token for tokens in kept for token in tokens]
    assert dataset.num_dropped == len(documents) - len(kept)


def test_positions_restart_in_every_fragment(tmp_path: Path) -> None:
    write(tmp_path, [[6, 10]])
    dataset = PretrainDataset(tmp_path, seq_len=8, shuffle=False)
    batch = collate_rows([dataset[0], dataset[1]])
    assert batch.input_ids.tolist() == [[*range(1, 9)], [*range(9, 17)]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1], [*range(8)]]
    # The cut keeps the true next token; documents end without one.
    assert batch.labels.tolist() == [[2, 3, 4, 5, 6, -100, 8, 9], [*range(10, 17), -100]]
    assert batch.cu_seqlens[:, :3].tolist() == [[0, 6, 8], [0, 8, 8]]


def test_rows_depend_on_seed_and_index_alone(tmp_path: Path) -> None:
    write(tmp_path, [[30] * 20, [30] * 20])
    first, second = (PretrainDataset(tmp_path, seq_len=8, seed=5) for _ in range(2))
    order = [first.locate(index) for index in range(len(first))]
    assert [second.locate(index) for index in reversed(range(len(first)))] == order[::-1]
    assert order != [first.locate(index + len(first)) for index in range(len(first))]
    other = PretrainDataset(tmp_path, seq_len=8, seed=6)
    assert order != [other.locate(index) for index in range(len(first))]
    assert (first[3].input_ids == second[3].input_ids).all()


def test_order_without_shuffling_is_the_files_own(tmp_path: Path) -> None:
    write(tmp_path, [[16], [8]])
    dataset = PretrainDataset(tmp_path, seq_len=8, shuffle=False)
    assert [dataset.locate(i) for i in range(6)] == [(0, 0), (0, 1), (1, 0)] * 2


def test_weights_set_proportions_and_each_domain_its_epochs(tmp_path: Path) -> None:
    write(tmp_path, [[80], [2400]])  # 10 rows and 300
    dataset = PretrainDataset(tmp_path, seq_len=8, weights=dict(d0=1, d1=3))
    located = [dataset.locate(index) for index in range(1000)]
    counts = Counter(domain for domain, _ in located)
    assert counts == {0: 250, 1: 750}
    rows = Counter(row for domain, row in located if domain == 0)
    assert set(rows.values()) == {25}  # 25 whole epochs of 10 rows
    rows = Counter(row for domain, row in located if domain == 1)
    assert sorted(set(rows.values())) == [2, 3]


def test_domains_keep_their_names(tmp_path: Path) -> None:
    write(tmp_path, [[8], [8], [8]])
    dataset = PretrainDataset(tmp_path, seq_len=8, domains=['d2', 'd0'], shuffle=False)
    assert dataset.domains == ['d0', 'd2']
    row = dataset[1]
    assert set(row.input_ids) == set(range(17, 25))
    assert row.domain_ids is not None
    assert set(row.domain_ids) == {1}
    assert row.num_domains == 2


def test_a_domain_may_have_several_files(tmp_path: Path) -> None:
    write(tmp_path / 'web', [[5, 6], [7]])
    dataset = PretrainDataset(tmp_path, seq_len=6, shuffle=False)
    assert dataset.domains == ['web']
    assert [dataset[i].input_ids.tolist() for i in range(3)] == [
        [1, 2, 3, 4, 5, 6],
        [7, 8, 9, 10, 11, 12],
        [13, 14, 15, 16, 17, 18],
    ]
    assert dataset[1].lengths.tolist() == [5, 1]


def test_a_token_file_is_one_domain(tmp_path: Path) -> None:
    write(tmp_path, [[8]])
    assert PretrainDataset(tmp_path / 'd0', seq_len=8).domains == ['d0']


def test_one_document_a_row_makes_dense_batches(tmp_path: Path) -> None:
    write(tmp_path, [[8] * 5])
    dataset = PretrainDataset(tmp_path, seq_len=8)
    assert collate_rows([dataset[i] for i in range(5)]).cu_seqlens.shape == (5, 2)


def test_max_docs_is_small_and_may_be_given(tmp_path: Path) -> None:
    write(tmp_path, [[200] * 10 + [100, 50] * 10])
    assert PretrainDataset(tmp_path, seq_len=512).max_docs == 16  # at most 9 overlap such a row
    assert PretrainDataset(tmp_path, seq_len=512, max_docs=12).max_docs == 12
    dataset = PretrainDataset(tmp_path, seq_len=512, max_docs=3)
    with pytest.raises(ValueError, match='more than the 3 the dataset allows'):
        [dataset[index] for index in range(len(dataset))]


def test_reading_far_into_many_documents(tmp_path: Path) -> None:
    documents, length, seq_len = 400_000, 50, 16
    with TokenFileWriter(tmp_path / 'data', vocab_size=60_000) as writer:
        ids = np.arange(documents * length) % 60_000
        writer.add_many(ids, np.full(documents, length))
    dataset = PretrainDataset(tmp_path / 'data', seq_len=seq_len)
    assert len(dataset) == 1_250_000
    row = dataset[1_000_000]
    place = dataset.locate(1_000_000)[1] * seq_len
    assert row.input_ids.tolist() == (np.arange(place, place + seq_len) % 60_000).tolist()


def test_is_registered(tmp_path: Path) -> None:
    write(tmp_path, [[8]])
    config = dict(type='PretrainDataset', data_root=str(tmp_path), seq_len=4)
    assert len(DATASETS.build(config)) == 2


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(seq_len=0), 'seq_len must be at least 1, got 0'),
        (dict(min_document_length=0), 'min_document_length must be at least 1'),
        (dict(domains=['d']), r"domains names an unknown domain 'd'\."),
        (dict(domains=[]), r'domains=\[\] names no domain; there are d0, d1'),
        (dict(domains='d0'), r"domains='d0': expected a list of domains, as \['d0'\]"),
        (dict(weights={}), r'weights=\{\} names no domain; there are d0, d1'),
        (dict(weights=dict(d0=1, dl=1)), r"weights names .* 'dl'\. Did you mean 'd1'\?"),
        (dict(weights=dict(d0=1, d1=0)), r"weights\['d1'\]=0 must be a positive number"),
        (dict(weights=dict(d0=1, d1='2')), r"weights\['d1'\]='2' must be a positive number"),
        (dict(weights=dict(d0=True, d1=1)), r"weights\['d0'\]=True must be"),
        (dict(weights=[1, 2]), r'weights=\[1, 2\]: expected a share for each domain'),
        (dict(weights=dict(d0=1), shuffle=False), 'shuffle=False'),
    ],
)
def test_options_that_are_wrong(tmp_path: Path, options: dict, message: str) -> None:
    write(tmp_path, [[8], [8]])
    with pytest.raises(ValueError, match=message):
        PretrainDataset(tmp_path, **(dict(seq_len=8) | options))


def test_rows_are_counted_from_zero(tmp_path: Path) -> None:
    write(tmp_path, [[8]])
    with pytest.raises(IndexError, match='-1'):
        PretrainDataset(tmp_path, seq_len=8)[-1]


def test_missing_data(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'preprocess_data\.py, or use .*RandomTokens'):
        PretrainDataset(tmp_path / 'none', seq_len=8)
    with pytest.raises(FileNotFoundError, match='holds no token file'):
        PretrainDataset(tmp_path, seq_len=8)


def test_training_and_validation_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path / 'train', [[8]])
    write(tmp_path / 'validation', [[8]])
    with pytest.raises(ValueError, match='name one of them'):
        find_token_files(tmp_path)
    assert list(find_token_files(tmp_path / 'train')) == ['d0']


def test_files_of_different_tokenizers(tmp_path: Path) -> None:
    for name, hash in (('a', 'x'), ('b', 'y')):
        mark = dict(type='T', hash=hash)
        with TokenFileWriter(tmp_path / name, vocab_size=9, tokenizer=mark) as writer:
            writer.add([1])
    with pytest.raises(ValueError, match='made with tokenizer'):
        PretrainDataset(tmp_path, seq_len=8)
    assert PretrainDataset(tmp_path, seq_len=8, domains=['b']).tokenizer == dict(type='T', hash='y')
    with TokenFileWriter(tmp_path / 'c', vocab_size=10) as writer:
        writer.add([1])
    with pytest.raises(ValueError, match='vocab_size=10'):
        PretrainDataset(tmp_path, seq_len=8, domains=['b', 'c'])
