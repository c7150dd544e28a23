"""The files, read back by the libraries they are for."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from internlm_mm.checkpoint.hf_files import HFWeights, publish_folder, write_weights
from internlm_mm.utils.weight_layout import WeightLayout

LAYOUT = WeightLayout.of_names({'layers.': 'model.layers.', 'head.': 'head.'})


def state():
    return {
        'layers.0.w': torch.randn(7, 5),
        'layers.1.w': torch.randn(3, 11),
        'head.w': torch.randn(13, 5).T,  # not contiguous
        'head.s': torch.randn(()),
    }


def write(folder, tensors, dtype='float32', max_bytes=10**9):
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_weights(folder, LAYOUT, tensors, shapes, dtype, max_bytes)


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
    weights = HFWeights(tmp_path, LAYOUT)
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
    with pytest.raises(ValueError, match=r'known are names that begin with layers'):
        write(tmp_path, {'tail.w': torch.ones(1)})


def test_published_when_whole(tmp_path):
    out = tmp_path / 'out'
    with publish_folder(out, overwrite=False) as folder:
        (folder / 'model.safetensors').write_text('1')
        assert not out.exists()
    assert (out / 'model.safetensors').read_text() == '1'
    with publish_folder(out, overwrite=True) as folder:
        (folder / 'b').write_text('2')
        assert (out / 'model.safetensors').exists()
    assert [path.name for path in out.iterdir()] == ['b']
    assert list(tmp_path.iterdir()) == [out]


def test_not_published_when_it_fails(tmp_path):
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'model.safetensors').write_text('1')
    with pytest.raises(KeyboardInterrupt), publish_folder(out, overwrite=True) as folder:
        (folder / 'b').write_text('2')
        raise KeyboardInterrupt
    assert [path.name for path in out.iterdir()] == ['model.safetensors']
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ('content', 'why'),
    [
        (['iter_5/metadata.json', 'iter_0/metadata.json'], "the folder 'iter_0'"),
        (['config.json', 'model.safetensors', '20260101/log'], "the folder '20260101'"),
        (['metadata.json', 'model.safetensors'], 'a checkpoint of internlm_mm'),
        (['notes.txt', 'thesis.tex'], "'notes.txt' and no weights"),
    ],
)
def test_only_what_a_conversion_left_is_replaced(tmp_path, content, why):
    for name in content:
        (tmp_path / 'out' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'out' / name).write_text('x')
    with pytest.raises(FileExistsError, match=f'not overwritten: it holds {why}'):
        publish_folder(tmp_path / 'out', overwrite=True).__enter__()
    assert all((tmp_path / 'out' / name).is_file() for name in content)


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / 'out').write_text('x')
    with pytest.raises(FileExistsError, match='it is no folder'):
        publish_folder(tmp_path / 'out', overwrite=True).__enter__()
    assert (tmp_path / 'out').read_text() == 'x'


def test_what_an_earlier_crash_left_is_cleared(tmp_path):
    (tmp_path / 'out.tmp').mkdir()
    (tmp_path / 'out.tmp' / 'stale').write_text('x')
    with publish_folder(tmp_path / 'out', overwrite=False):
        pass
    assert list((tmp_path / 'out').iterdir()) == []


def write_bin(folder, tensors, files=1):
    """`pytorch_model.bin`, or several with an index, as transformers 4 left them."""
    if files == 1:
        torch.save(tensors, folder / 'pytorch_model.bin')
        return
    weight_map = {}
    for number in range(files):
        part = dict(list(tensors.items())[number::files])
        file = f'pytorch_model-{number + 1:05}-of-{files:05}.bin'
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / 'pytorch_model.bin.index.json'
    index.write_text(json.dumps({'metadata': {}, 'weight_map': weight_map}))


@pytest.mark.parametrize('files', [1, 3])
def test_files_of_torch_save(tmp_path, files):
    tensors = {f'layers.{i}.w': torch.randn(3, 2).bfloat16() for i in range(5)}
    write_bin(tmp_path, tensors, files)
    weights = HFWeights(tmp_path)
    assert set(weights) == set(tensors)
    for name, tensor in tensors.items():
        assert weights.shape(name) == [3, 2] and weights.dtype(name) == torch.bfloat16
        assert torch.equal(weights[name], tensor)
    weights.check_files()


def test_safetensors_are_taken_first(tmp_path):
    write_bin(tmp_path, {'w': torch.zeros(2)})
    save_file({'w': torch.ones(2)}, tmp_path / 'model.safetensors')
    weights = HFWeights(tmp_path)
    assert torch.equal(weights['w'], torch.ones(2)) and weights.dtype('w') == torch.float32


@pytest.mark.parametrize('pickled', [True, False])
def test_damaged_folders(tmp_path, pickled):
    tensors = {f'layers.{i}': torch.randn(10, 5) for i in range(6)}
    if pickled:
        write_bin(tmp_path, tensors, 3)
        index, second = 'pytorch_model.bin.index.json', 'pytorch_model-00002-of-00003.bin'
    else:
        write(tmp_path, tensors, max_bytes=450)
        index, second = 'model.safetensors.index.json', 'model-00002-of-00003.safetensors'
    text = (tmp_path / index).read_text()
    other = tmp_path / second.replace('00002', '00001')
    whole = (tmp_path / second).read_bytes()
    (tmp_path / second).write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=f'{second} lacks .*, which {index} places there'):
        HFWeights(tmp_path)
    (tmp_path / second).write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=f'{second} is truncated'):
        HFWeights(tmp_path)
    (tmp_path / second).unlink()
    with pytest.raises(FileNotFoundError, match=f'{index} names {second}, which is missing'):
        HFWeights(tmp_path)
    for broken in (text[:-9], '[]', '{}'):
        (tmp_path / index).write_text(broken)
        with pytest.raises(ValueError, match=f'{index} is truncated or damaged'):
            HFWeights(tmp_path)


@pytest.mark.parametrize('file', [5, None, '../model.safetensors', '/etc/passwd'])
def test_an_index_names_files_beside_it(tmp_path, file):
    index = tmp_path / 'model.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': {'w': file}}))
    with pytest.raises(ValueError, match=f"json places 'w' in {file!r}; expected a file beside it"):
        HFWeights(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='holds no weights'):
        HFWeights(tmp_path)
