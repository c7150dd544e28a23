"""Files written tensor by tensor, read by safetensors itself."""

import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from internlm_mm.checkpoint.tensor_file import DTYPE_CODES, Entry, plan_shards, write_tensor_file

SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), max_size=5)


@given(SHAPES, st.sampled_from(sorted(DTYPE_CODES, key=str)))
def test_safetensors_reads_it(tmp_path_factory, shapes, dtype):
    path = tmp_path_factory.mktemp('x') / 'x.safetensors'
    tensors = {f't{i}': (torch.rand(shape) * 9).to(dtype) for i, shape in enumerate(shapes)}
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    assert [entry.nbytes for entry in entries] == [tensor.nbytes for tensor in tensors.values()]
    written = write_tensor_file(path, entries, tensors.values())
    content = path.read_bytes()
    assert written == (len(content), zlib.crc32(content))
    read = load_file(path)
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == dtype and read[name].shape == tensor.shape
        bits = (x.reshape(-1).view(torch.uint8) for x in (read[name], tensor))
        assert torch.equal(*bits)


def test_one_tensor_lives_at_a_time(tmp_path):
    alive = []

    def make():
        for _ in range(4):
            tensor = torch.ones(3)
            alive.append(tensor.untyped_storage()._weak_ref())
            yield tensor
            del tensor
            assert all(torch.UntypedStorage._expired(ref) for ref in alive[:-1])

    entries = [Entry(f't{i}', torch.float32, (3,)) for i in range(4)]
    write_tensor_file(tmp_path / 'x.safetensors', entries, make())


@pytest.mark.parametrize('tensor', [torch.ones(4), torch.ones(3).half()])
def test_another_tensor_than_announced(tmp_path, tensor):
    with pytest.raises(ValueError, match=r'w is \[.*expected \[3\] of torch\.float32'):
        write_tensor_file(tmp_path / 'x', [Entry('w', torch.float32, (3,))], [tensor])


@given(st.lists(st.integers(1, 40), max_size=12), st.integers(1, 100))
def test_files_are_filled_in_order(sizes, most):
    entries = [Entry(f't{i}', torch.uint8, (size,)) for i, size in enumerate(sizes)]
    shards = plan_shards(entries, most)
    assert [entry for shard in shards for entry in shard] == entries
    bytes_of = [sum(entry.nbytes for entry in shard) for shard in shards]
    assert all(n <= most or len(shard) == 1 for n, shard in zip(bytes_of, shards, strict=True))
    for n, following in zip(bytes_of, shards[1:], strict=False):
        assert n + following[0].nbytes > most  # or it would be in the file before
