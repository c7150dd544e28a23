"""The files, read back by the libraries they are for."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from internlm_mm.checkpoint.hf_files import HFWeights, publish_folder, write_weights

NAMES = {'layers.': 'model.layers.', 'head.': 'head.'}


def state():
    return {
        'layers.0.w': torch.randn(7, 5),
        'layers.1.w': torch.randn(3, 11),
        'head.w': torch.randn(13, 5).T,  # not contiguous
        'head.s': torch.randn(()),
    }


def write(folder, tensors, dtype='float32', max_bytes=10**9):
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_weights(folder, NAMES, tensors, shapes, dtype, max_bytes)


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
@pytest.mark.parametrize('max_bytes', [1, 200, 10**9])
def test_safetensors_reads_what_we_write(tmp_path, dtype, max_bytes):
    tensors = state()
    write(tmp_path, tensors, dtype, max_bytes)
    read = {}
    for file in tmp_path.glob('*.safetensors'):
        read |= load_file(file)
        with safe_open(file, framework='pt') as opened:
            assert opened.metadata() == {'format': 'pt'}
    assert set(read) == {'model.layers.0.w', 'model.layers.1.w', 'head.w', 'head.s'}
    weights = HFWeights(tmp_path, NAMES)
    assert len(weights) == 4
    for name, tensor in tensors.items():
        assert torch.equal(weights[name], tensor.to(getattr(torch, dtype)))


def test_shards_keep_to_their_size(tmp_path):
    tensors = {f'layers.{i}': torch.randn(10, 5) for i in range(7)}  # 200 bytes each
    write(tmp_path, tensors, max_bytes=450)
    files = sorted(tmp_path.glob('*.safetensors'))
    assert [len(load_file(file)) for file in files] == [2, 2, 2, 1]
    assert files[0].name == 'model-00001-of-00004.safetensors'
    index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
    assert len(index['weight_map']) == 7


def test_a_name_outside_the_table(tmp_path):
    with pytest.raises(ValueError, match='begins with none of layers'):
        write(tmp_path, {'tail.w': torch.ones(1)})


def test_published_when_whole(tmp_path):
    out = tmp_path / 'out'
    with publish_folder(out, overwrite=False) as folder:
        (folder / 'a').write_text('1')
        assert not out.exists()
    assert (out / 'a').read_text() == '1'
    with publish_folder(out, overwrite=True) as folder:
        (folder / 'b').write_text('2')
        assert (out / 'a').exists()
    assert [path.name for path in out.iterdir()] == ['b']
    assert list(tmp_path.iterdir()) == [out]


def test_not_published_when_it_fails(tmp_path):
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'a').write_text('1')
    with pytest.raises(KeyboardInterrupt), publish_folder(out, overwrite=True) as folder:
        (folder / 'b').write_text('2')
        raise KeyboardInterrupt
    assert [path.name for path in out.iterdir()] == ['a']
    assert list(tmp_path.iterdir()) == [out]


def test_what_an_earlier_crash_left_is_cleared(tmp_path):
    (tmp_path / 'out.tmp').mkdir()
    (tmp_path / 'out.tmp' / 'stale').write_text('x')
    with publish_folder(tmp_path / 'out', overwrite=False):
        pass
    assert list((tmp_path / 'out').iterdir()) == []
