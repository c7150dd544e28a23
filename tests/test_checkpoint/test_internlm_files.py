"""Folders of shards with something missing, of another kind, or damaged."""

import pytest
import torch

from internlm_mm.checkpoint.internlm_files import is_internlm_folder
from internlm_mm.checkpoint.internlm_shards import import_internlm
from tests.internlm_oracle import SIZES, full_state, write_shards


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path / 'x', full_state(SIZES, True), SIZES, tp=2, pp=2, config={})
    return tmp_path / 'x'


def change(file, edit):
    state = torch.load(file, weights_only=True)
    edit(state)
    torch.save(state, file)


def test_a_missing_shard(folder):
    assert is_internlm_folder(folder)
    (folder / 'model_tp1_pp0.pt').unlink()
    with pytest.raises(FileNotFoundError, match=r'model_tp1_pp0\.pt is missing.*2 tensor-par'):
        import_internlm(folder)


def test_no_shards(tmp_path, folder):
    (tmp_path / 'y').mkdir()
    with pytest.raises(FileNotFoundError, match=r'holds no model_tp\*_pp\*\.pt$'):
        import_internlm(tmp_path / 'y')
    for step in ('900', '1000'):
        (tmp_path / 'y' / step).mkdir()
        (tmp_path / 'y' / step / 'model_tp0_pp0.pt').touch()
    with pytest.raises(FileNotFoundError, match='its folder 1000 does'):
        import_internlm(tmp_path / 'y')
    with pytest.raises(FileNotFoundError, match='does not exist'):
        import_internlm(tmp_path / 'z')
    assert not is_internlm_folder(tmp_path / 'y') and not is_internlm_folder(tmp_path / 'z')


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('model_tp0_wp1_pp0.pt', 'weight parallelism'),
        ('model_tp0_pp0_dp1.pt', 'FSDP'),
        ('model_moe_layer0_expert0_tp0.pt', 'experts of a mixture'),
    ],
)
def test_kinds_of_shards_that_are_not_read(folder, name, message):
    (folder / name).touch()
    with pytest.raises(ValueError, match=message):
        import_internlm(folder)


def test_a_tensor_missing_in_one_part(folder):
    change(folder / 'model_tp1_pp1.pt', lambda s: s.pop('model.norm.weight'))
    with pytest.raises(ValueError, match=r"tp1_pp1\.pt has no 'model\.norm\.weight', which model_"):
        import_internlm(folder)


def test_parts_of_different_shapes(folder):
    edit = {'model.head.weight': torch.ones(47, 32)}
    change(folder / 'model_tp1_pp1.pt', lambda s: s.update(edit))
    with pytest.raises(ValueError, match=r"tp1_pp1\.pt: 'model\.head\.weight' has shape \[47"):
        import_internlm(folder)


def test_damaged_files(folder):
    path = folder / 'model_tp1_pp0.pt'
    whole = path.read_bytes()
    path.write_bytes(whole[:-2000])
    with pytest.raises(ValueError, match=r'model_tp1_pp0\.pt is truncated'):
        import_internlm(folder)
    path.write_bytes(whole)
    _, weights = import_internlm(folder)
    tensor = weights.shards.files[0][1].get_tensor('model.blocks.0.mlp.w1.weight')
    position = whole.index(tensor.numpy().tobytes())
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    _, weights = import_internlm(folder)
    with pytest.raises(ValueError, match=r'model_tp1_pp0\.pt is damaged: Bad CRC'):
        weights.check_files()
