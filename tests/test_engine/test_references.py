"""What is asked of a model before it is trained: by whom, how often, and when it is stale."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config

from internlm_mm.datasets import PreferenceDataset
from internlm_mm.datasets.token_cache import SOURCE_NAME
from internlm_mm.engine.references import (
    compute_references,
    describe,
    hash_model,
    hash_weights,
    keep_references,
    read_references,
)
from internlm_mm.registry import MODELS
from tests.conversations import internlm_model
from tests.strategies import strategy
from tests.test_models.helpers import SIZES, randomize


def pairs_in(folder: Path) -> None:
    """Two domains with pairs of several lengths."""
    for name, numbers in (('a', range(11)), ('b', range(11, 14))):
        lines = [
            json.dumps(dict(prompt=f'Is {n} odd?', chosen='Yes ' * (1 + n % 4), rejected=f'No {n}'))
            for n in numbers
        ]
        (folder / f'{name}.jsonl').write_text('\n'.join(lines))


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('references')
    internlm_model(folder / 'tokenizer')
    (folder / 'pairs').mkdir()
    pairs_in(folder / 'pairs')
    return folder


def dataset(folder: Path, **options) -> PreferenceDataset:
    options = dict(seq_len=160, chat_template='internlm2', cache_dir=folder / 'cache') | options
    return PreferenceDataset(folder / 'pairs', tokenizer=str(folder / 'tokenizer'), **options)


def prepared(vocab_size: int, parallel: dict):
    built = strategy(parallel=parallel)
    sizes = SIZES | dict(vocab_size=vocab_size + vocab_size % 2, max_seq_len=160)
    model = MODELS.build(
        dict(type='InternLM', **sizes, objective=dict(type='DPO', reference='precomputed'))
    )
    built.prepare(randomize(model, 0.1))
    return built


def ask(folder: Path, parallel: dict) -> tuple[str, list[np.ndarray]]:
    rows = dataset(folder)
    built = prepared(rows.vocab_size, parallel)
    return hash_weights(built.model), compute_references(built, rows, 2)


def test_every_pair_is_asked_about_once_on_every_layout(two_ranks, data) -> None:
    weights, found = ask(data, {})
    rows = dataset(data, packing=None, shuffle=False)
    model = prepared(rows.vocab_size, {}).model
    for domain, array in enumerate(found):
        assert array.shape == (rows.num_pairs[domain], 2) and array.dtype == np.float32
        for pair in range(len(array)):
            row, start = rows.read(domain, pair), 0
            for side, length in enumerate(row.lengths[:2]):
                part = slice(start, start + length)
                with torch.no_grad():
                    logits = model.logits(torch.from_numpy(row.input_ids[part])[None])[0]
                labels = torch.from_numpy(row.labels[part])
                told = logits.log_softmax(-1)[torch.arange(length), labels.clamp(min=0)]
                assert array[pair, side] == pytest.approx(told[labels >= 0].sum().item(), rel=1e-4)
                start += length
    for parallel in ({'data_shard': 2}, {'data_replicate': 2}, {'tensor': 2}):
        for theirs, arrays in two_ranks(ask, data, parallel):
            assert theirs == weights
            for one, two in zip(arrays, found, strict=True):
                np.testing.assert_allclose(one, two, rtol=1e-5)


def test_a_hash_tells_weights_apart() -> None:
    model = prepared(40, {}).model
    first = hash_weights(model)
    assert first == hash_weights(model)
    with torch.no_grad():
        model.norm.weight[3] += 1e-6
    assert hash_weights(model) != first


@pytest.mark.parametrize(
    'change', [dict(rope_theta=100.0), dict(norm_eps=1e-2), dict(num_heads=2), dict(adapter=4)]
)
def test_a_hash_tells_apart_what_is_made_of_the_same_weights(change) -> None:
    model, said = prepared(40, {}).model, dict(type='InternLM', num_heads=4)

    def found(config: dict) -> str:
        return hash_model(model, Config(dict(model=config)))

    assert found(said) == found(dict(reversed(said.items())))
    assert found(said) == found(said | dict(objective=dict(type='IPO')))
    assert found(said) != found(said | change)


def test_what_was_kept_is_read_and_nothing_else(data) -> None:
    rows = dataset(data)
    built = prepared(rows.vocab_size, {})
    source = describe(built, rows, 'abc')
    assert read_references(source, rows) is None
    arrays = [np.random.rand(pairs, 2).astype(np.float32) for pairs in rows.num_pairs]
    folder = keep_references(source, rows, arrays)
    for one, two in zip(read_references(source, rows), arrays, strict=True):
        assert (one == two).all()
    for other in (
        describe(built, rows, 'abd'),
        describe(built, dataset(data, chat_template='internlm'), 'abc'),
        describe(built, dataset(data, seq_len=170), 'abc'),
        describe(strategy(precision={'param': 'float64'}), rows, 'abc'),
    ):
        assert read_references(other, rows) is None

    (folder / '1.npy').write_bytes((folder / '0.npy').read_bytes())
    with pytest.raises(ValueError, match=r'is damaged: \[11, 2\] numbers.* for 3 pairs: delete it'):
        read_references(source, rows)
    np.save(folder / '1.npy', np.full((3, 2), np.nan))
    with pytest.raises(ValueError, match='some that are not finite'):
        read_references(source, rows)
    (folder / '1.npy').write_bytes(b'x')
    with pytest.raises(ValueError, match=r'is damaged .*: delete it'):
        read_references(source, rows)
    np.save(folder / '1.npy', arrays[1])
    (folder / SOURCE_NAME).write_text(json.dumps(source | {'model': 'old'}))
    with pytest.raises(ValueError, match="is stale: its model is 'old', and not 'abc'"):
        read_references(source, rows)
