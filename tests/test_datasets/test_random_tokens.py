import numpy as np
import pytest

from internlm_mm.datasets import RandomTokens, collate_rows
from internlm_mm.registry import DATASETS
from internlm_mm.structures import IGNORE_INDEX


def test_rows_are_one_document() -> None:
    dataset = RandomTokens(vocab_size=50, seq_len=64)
    batch = collate_rows([dataset[0], dataset[10**9]])
    assert batch.cu_seqlens.tolist() == [[0, 64], [0, 64]]
    assert batch.num_targets == 128
    assert batch.labels[:, :-1].tolist() == batch.input_ids[:, 1:].tolist()
    assert batch.domain_ids is None


def test_rows_are_a_function_of_seed_and_index() -> None:
    dataset = RandomTokens(vocab_size=50, seq_len=64, seed=1)
    rows = {tuple(dataset[index].input_ids) for index in (0, 1, 2**40)}
    other = RandomTokens(vocab_size=50, seq_len=64, seed=2)
    assert len(rows | {tuple(other[0].input_ids)}) == 4
    assert tuple(RandomTokens(vocab_size=50, seq_len=64, seed=1)[0].input_ids) in rows


def test_tokens_are_uniform() -> None:
    tokens = RandomTokens(vocab_size=10, seq_len=100_000)[0].input_ids
    counts = np.bincount(tokens, minlength=10)
    assert np.abs(counts - 10_000).max() < 500  # 5 deviations


def test_document_lengths() -> None:
    dataset = RandomTokens(vocab_size=50, seq_len=64, document_lengths=[5, 20])
    batch = collate_rows([dataset[index] for index in range(20)])
    assert batch.cu_seqlens.shape == (20, 14)  # at most ceil(64 / 5) documents
    seen = set()
    for index in range(20):
        lengths = dataset[index].lengths
        assert lengths.sum() == 64
        seen.update(lengths[:-1].tolist())
        ends = np.cumsum(lengths)[:-1] - 1
        labels = batch.labels[index].numpy()
        assert (labels == IGNORE_INDEX).nonzero()[0].tolist() == ends.tolist()
    assert seen == {5, 20}


def test_is_registered_under_its_name() -> None:
    dataset = DATASETS.build(dict(type='RandomTokens', vocab_size=9, seq_len=8))
    assert len(dataset) == 1_000_000
    assert dataset.domains == ()


@pytest.mark.parametrize(
    'options', [dict(vocab_size=0), dict(seq_len=0), dict(num_rows=0)], ids=str
)
def test_sizes_of_nothing(options: dict) -> None:
    with pytest.raises(ValueError, match=f'{next(iter(options))} must be at least 1, got 0'):
        RandomTokens(**(dict(vocab_size=9, seq_len=8) | options))


@pytest.mark.parametrize('lengths', [[], [0, 3]])
def test_documents_of_nothing(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match='document_lengths'):
        RandomTokens(vocab_size=9, seq_len=8, document_lengths=lengths)


def test_misspelt_option() -> None:
    with pytest.raises(TypeError, match='vocabulary'):
        RandomTokens(vocabulary=9, seq_len=8)  # type: ignore[call-arg]
