"""Files of torch.save that hold tensors, and those that must be refused."""

import os
import re
from datetime import timedelta

import pytest
import torch
from safetensors.torch import save_file

from internlm_mm.checkpoint.pickled import (
    PickledTensors,
    check_pickled,
    dtype_named,
    open_tensors,
    read_pickled,
)


class Code:
    """Runs a command when it is unpickled by a reader that allows it."""

    def __reduce__(self):
        return os.mkdir, ('pickle_was_here',)


@pytest.fixture
def state():
    return {'a.weight': torch.arange(12.0).view(3, 4), 'b': torch.ones(5, dtype=torch.bfloat16)}


@pytest.mark.parametrize('zipped', [True, False])
def test_tensors_by_name(tmp_path, state, zipped):
    path = tmp_path / 'x.bin'
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with open_tensors(path) as file:
        assert sorted(file.keys()) == ['a.weight', 'b']
        for name, tensor in state.items():
            assert torch.equal(file.get_tensor(name), tensor)
            assert file.get_slice(name).get_shape() == list(tensor.shape)
            assert dtype_named(file.get_slice(name).get_dtype()) == tensor.dtype
        assert torch.equal(file.get_slice('a.weight')[1:, :2], state['a.weight'][1:, :2])
    check_pickled(path)


def test_safetensors_look_the_same(tmp_path, state):
    path = tmp_path / 'x.safetensors'
    save_file(state, path)
    with open_tensors(path) as file:
        assert torch.equal(file.get_tensor('b'), state['b'])
        assert dtype_named(file.get_slice('b').get_dtype()) == torch.bfloat16


def test_mappings_are_renewed(tmp_path, state, monkeypatch):
    monkeypatch.setattr('internlm_mm.checkpoint.pickled._MAX_MAPPED', 20)
    torch.save(state, tmp_path / 'x.pt')
    file = PickledTensors(tmp_path / 'x.pt')
    for _ in range(3):
        kept = file.get_tensor('a.weight')
        assert torch.equal(file.get_tensor('b'), state['b'])
        assert torch.equal(kept, state['a.weight'])


def test_plain_values(tmp_path):
    config = {'num_layers': 32, 'dtype': torch.bfloat16, 'mlp_ratio': 8 / 3, 'parts': [(0, 1)]}
    torch.save(config, tmp_path / 'model_config.pt')
    assert read_pickled(tmp_path / 'model_config.pt') == config


@pytest.mark.parametrize('zipped', [True, False])
def test_pickled_code_is_not_run(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({'w': torch.ones(2), 'x': Code()}, 'x.pt', _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r'x\.pt holds pickled code .*: posix\.mkdir; expected'):
        read_pickled(tmp_path / 'x.pt')
    assert not (tmp_path / 'pickle_was_here').exists()


def test_objects_are_not_made(tmp_path):
    torch.save({'x': timedelta(1)}, tmp_path / 'x.pt')
    with pytest.raises(ValueError, match=r'x\.pt holds pickled code or objects.*timedelta'):
        read_pickled(tmp_path / 'x.pt')


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('share', [0.0, 0.05, 0.5, 0.99])
def test_truncated(tmp_path, state, share, zipped):
    path = tmp_path / 'x.pt'
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=re.escape(str(path)) + ' is truncated'):
        PickledTensors(path)


@pytest.mark.parametrize('content', [b'', b'not at all', b'\x80\x02K\x01.'])
def test_no_such_file(tmp_path, content):
    (tmp_path / 'x.bin').write_bytes(content)
    with pytest.raises(ValueError, match=r'x\.bin'):
        PickledTensors(tmp_path / 'x.bin')


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_pickled(tmp_path / 'x.pt')


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ([torch.ones(2)], 'holds a list; expected tensors by name'),
        ({'model': {'w': torch.ones(2)}}, "holds a dict at 'model'; expected a tensor"),
        ({3: torch.ones(2)}, 'holds a Tensor at 3'),
    ],
)
def test_what_is_not_named_tensors(tmp_path, content, message):
    torch.save(content, tmp_path / 'x.pt')
    with pytest.raises(ValueError, match=message):
        PickledTensors(tmp_path / 'x.pt')


def test_changed_bytes(tmp_path):
    path = tmp_path / 'x.pt'
    tensor = torch.full((64,), 3.25)
    torch.save({'w': tensor}, path)
    content = bytearray(path.read_bytes())
    content[content.index(tensor.numpy().tobytes()) + 17] ^= 1
    path.write_bytes(content)
    PickledTensors(path)  # no checksum is compared on opening
    with pytest.raises(ValueError, match=r'x\.pt is damaged: Bad CRC-32'):
        check_pickled(path)


def test_files_without_checksums(tmp_path, state):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / 'x.pt')
    finally:
        torch.serialization.set_crc32_options(True)
    check_pickled(tmp_path / 'x.pt')


def test_truncated_safetensors(tmp_path, state):
    path = tmp_path / 'x.safetensors'
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-3])
    with (
        pytest.raises(ValueError, match=r'x\.safetensors is truncated or damaged'),
        open_tensors(path),
    ):
        pass


@pytest.mark.parametrize('name', ['model.safetensors', 'pytorch_model.bin'])
def test_what_git_leaves_without_its_extension(tmp_path, name):
    path, digest = (
        tmp_path / name,
        '4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393',
    )
    lines = ('version https://git-lfs.github.com/spec/v1', f'oid sha256:{digest}', 'size 9945')
    path.write_text('\n'.join(lines) + '\n')
    with pytest.raises(ValueError, match=f'{name} is the pointer .* `git lfs pull`'):
        open_tensors(path).__enter__()


def test_unknown_dtype():
    with pytest.raises(ValueError, match="'F3' is unknown"):
        dtype_named('F3')
