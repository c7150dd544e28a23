"""Checkpoints written tensor by tensor are those that the checkpointer reads."""

import pytest
import torch

from internlm_mm.checkpoint.checkpointer import Checkpointer
from internlm_mm.checkpoint.step_folders import read_model_state, read_state, verify
from internlm_mm.checkpoint.stream_writer import entries_of, write_weights_checkpoint


class Weights(dict):
    """Tensors that count how often they are read."""

    reads = 0

    def __getitem__(self, name):
        Weights.reads += 1
        return super().__getitem__(name)

    def shape(self, name):
        return list(super().__getitem__(name).shape)

    def dtype(self, name):
        return super().__getitem__(name).dtype


@pytest.fixture
def weights():
    return Weights(a=torch.randn(4, 3), b=torch.randn(5).bfloat16(), c=torch.randn(7, 2).half())


@pytest.mark.parametrize('max_shard_bytes', [1, 60, 10**9])
def test_the_checkpointer_reads_it(tmp_path, weights, max_shard_bytes):
    path, seen = tmp_path / 'iter_0', []
    (tmp_path / 'words').mkdir()
    (tmp_path / 'words' / 'tokenizer.model').write_bytes(b'x')
    entries = entries_of(weights, ['c', 'a', 'b'])
    before = Weights.reads
    write_weights_checkpoint(
        path, weights, entries, {'iter': 0}, {'config.json': '{}'},
        {'tokenizer': tmp_path / 'words'}, max_shard_bytes=max_shard_bytes,
        on_tensor=lambda entry, tensor: seen.append((entry.name, tensor.nbytes)),
    )  # fmt: skip
    assert Weights.reads - before == 3
    assert seen == [(entry.name, entry.nbytes) for entry in entries]
    assert verify(path) == [] and read_state(path) == {'iter': 0}
    assert (path / 'tokenizer' / 'tokenizer.model').read_bytes() == b'x'
    files = len(list(path.glob('shard_*.safetensors')))
    assert files == {1: 3, 60: 2, 10**9: 1}[max_shard_bytes]
    stored = read_model_state(path)
    assert set(stored) == {'a', 'b', 'c'}
    for name, tensor in weights.items():
        assert stored[name].dtype == tensor.dtype and torch.equal(stored[name], tensor)
    into = {'model.a': torch.zeros(4, 3), 'model.b': torch.zeros(5)}
    Checkpointer(async_save=False).load(path, into)
    assert torch.equal(into['model.b'], weights['b'].float())


def test_another_dtype(tmp_path, weights):
    entries = entries_of(weights, list(weights), torch.float16)
    write_weights_checkpoint(tmp_path / 'iter_0', weights, entries, {}, {}, {})
    stored = read_model_state(tmp_path / 'iter_0')
    assert all(torch.equal(stored[name], tensor.half()) for name, tensor in weights.items())


def test_what_fails_is_never_published(tmp_path, weights):
    def stop(entry, tensor):
        raise ValueError('no')

    entries = entries_of(weights, list(weights))
    with pytest.raises(ValueError, match='no'):
        write_weights_checkpoint(
            tmp_path / 'iter_0', weights, entries, {}, {}, {}, on_tensor=stop
        )  # fmt: skip
    assert not (tmp_path / 'iter_0').exists()
