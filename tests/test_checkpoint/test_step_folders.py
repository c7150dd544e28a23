"""Checkpoints that are damaged, passed over, listed, or of another model."""

from pathlib import Path

import pytest
import torch

from internlm_mm.checkpoint.checkpointer import Checkpointer
from internlm_mm.checkpoint.step_folders import (
    check_tensors,
    find_checkpoint,
    list_checkpoints,
    newest_whole_checkpoint,
    verify,
)
from tests.saving import saved


def truncate(path: Path) -> None:
    content = (path / 'shard_0.safetensors').read_bytes()
    (path / 'shard_0.safetensors').write_bytes(content[:-1])


def flip(path: Path) -> None:
    content = bytearray((path / 'shard_0.safetensors').read_bytes())
    content[-1] ^= 1
    (path / 'shard_0.safetensors').write_bytes(content)


DAMAGE = [
    (lambda p: (p / 'shard_0.safetensors').unlink(), 'shard_0.safetensors is missing'),
    (truncate, 'bytes instead of'),
    (flip, 'shard_0.safetensors is damaged: its checksum differs'),
    (lambda p: (p / 'state.json').write_text('{}'), 'state.json has 2 bytes instead of'),
    (lambda p: (p / 'metadata.json').unlink(), 'metadata.json is missing'),
    (lambda p: (p / 'manifest.json').unlink(), 'manifest.json is missing'),
    (lambda p: (p / 'manifest.json').write_text('{"files"'), 'manifest.json is damaged'),
    (lambda p: (p / 'manifest.json').write_text('[]'), 'manifest.json is damaged'),
    (lambda p: (p / 'manifest.json').write_text('{}'), 'manifest.json is damaged'),
    (lambda p: (p / 'manifest.json').write_text('{"files": [1]}'), 'manifest.json is damaged'),
    (lambda p: (p / 'manifest.json').write_text('{"files": {"x": 1}}'), 'manifest.json is damaged'),
    (lambda p: (p / 'manifest.json').write_bytes(b'\xff\xfe'), 'manifest.json is damaged'),
]


@pytest.mark.parametrize(('damage', 'message'), DAMAGE)
def test_damage_is_found_and_the_newest_whole_one_is_used(
    tmp_path: Path, damage, message: str
) -> None:
    older, newer = saved(tmp_path / 'iter_9'), saved(tmp_path / 'iter_10')
    assert newest_whole_checkpoint(tmp_path) == (newer, {})
    damage(newer)
    problems = verify(newer)
    assert len(problems) == 1 and message in problems[0]
    newest, damaged = newest_whole_checkpoint(tmp_path)
    assert newest == older
    assert damaged == {newer: problems[0]}
    assert find_checkpoint(tmp_path) == older


def test_sizes_alone_do_not_show_a_flipped_bit(tmp_path: Path) -> None:
    flip(saved(tmp_path / 'iter_1'))
    assert verify(tmp_path / 'iter_1', checksums=False) == []
    assert len(verify(tmp_path / 'iter_1')) == 1


def test_nothing_whole_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match='holds no whole checkpoint'):
        find_checkpoint(tmp_path)
    truncate(saved(tmp_path / 'iter_4'))
    with pytest.raises(FileNotFoundError, match=r'iter_4: shard_0\.safetensors has .* bytes'):
        find_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match='does not exist'):
        find_checkpoint(tmp_path / 'elsewhere')
    with pytest.raises(FileNotFoundError, match=r"work dir\. Did you mean '.*/iter_4'\?$"):
        find_checkpoint(tmp_path / 'itr_4')
    (tmp_path / 'file').touch()
    with pytest.raises(FileNotFoundError, match='file is no folder: expected a checkpoint iter_N'):
        find_checkpoint(tmp_path / 'file')
    (tmp_path / 'hf').mkdir()
    (tmp_path / 'hf' / 'model.safetensors').touch()
    with pytest.raises(FileNotFoundError, match='is a Hugging Face folder'):
        find_checkpoint(tmp_path / 'hf')


def test_checkpoints_are_listed_by_number(tmp_path: Path) -> None:
    for name in (
        'iter_10',
        'iter_9',
        'iter_100',
        'iter_9.tmp',
        'iter_x',
        'iter_7.removed',
        'other',
    ):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ['iter_9', 'iter_10', 'iter_100']


# ----------------------------------------------------------------------------- another model


def test_another_model_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path / 'iter_1')
    check_tensors(path, {'model.weight': (3, 2)})
    with pytest.raises(ValueError, match=r"'model\.wieght'\. Did you mean 'model\.weight'\?"):
        check_tensors(path, {'model.wieght': (3, 2)})
    with pytest.raises(ValueError, match=r'has shape \[3, 2\] there and \[2, 3\] here'):
        check_tensors(path, {'model.weight': (2, 3)})
    scored = tmp_path / 'iter_2'
    tensors = {'model.norm.weight': torch.ones(2), 'model.objective.score.weight': torch.ones(2)}
    Checkpointer(async_save=False).save(scored, tensors, {})
    with pytest.raises(ValueError, match=r"'model\.lm_head\.weight'\. It is a reward model"):
        check_tensors(scored, {'model.lm_head.weight': (2,)})
    target = {'model.weight': torch.zeros(3, 2), 'model.other': torch.zeros(1)}
    with pytest.raises(ValueError, match='checkpoint of another model'):
        Checkpointer().load(path, target)
    assert torch.count_nonzero(target['model.weight']) == 0
