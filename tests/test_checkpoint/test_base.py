import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from internlm_mm.checkpoint.base import (
    describe_base,
    find_base,
    fingerprint,
    recorded_base,
    sees_all,
)
from tests.trained import adapted_run, trained_run

pytestmark = pytest.mark.filterwarnings('ignore:torch.distributed is disabled:UserWarning')


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Path]:
    hf, work_dir, _ = adapted_run(tmp_path)
    return hf, work_dir / 'iter_3'


def test_it_is_found_where_it_was_and_where_it_went(run, tmp_path: Path) -> None:
    hf, checkpoint = run
    assert find_base(checkpoint) == recorded_base(checkpoint) == describe_base(hf)
    shutil.copytree(hf, tmp_path / 'twin')
    assert find_base(checkpoint, tmp_path / 'twin').path == tmp_path / 'twin'
    shutil.rmtree(hf)
    with pytest.raises(FileNotFoundError, match=f'weights in {hf}; .* say with base where they'):
        find_base(checkpoint)
    assert find_base(tmp_path / 'work' / 'iter_3') is None  # holds all of its weights


def test_other_weights_are_refused(run, tmp_path: Path) -> None:
    hf, checkpoint = run
    file = hf / 'model.safetensors'
    tensors = load_file(file)
    tensors['model.norm.weight'][3] += 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r'adapters of other weights than those in .*hf: its base'):
        find_base(checkpoint)


def test_a_work_dir_means_its_checkpoint(run, tmp_path: Path) -> None:
    full, _, _ = trained_run(tmp_path / 'full')
    said = describe_base(full / 'iter_3')
    state = run[1] / 'state.json'
    state.write_text(f'{{"base": {str(said.as_json()).replace(chr(39), chr(34))}}}')
    shutil.move(full, tmp_path / 'moved')
    assert find_base(run[1], tmp_path / 'moved').path == tmp_path / 'moved' / 'iter_3'


def test_fingerprints_see_names_sizes_and_every_byte(tmp_path: Path) -> None:
    def of(folder: str, name: str = 'model.safetensors', size: int = 300_000, at: int = -1) -> str:
        tensor = torch.zeros(size, dtype=torch.uint8)
        if at >= 0:
            tensor[at] = 1
        (tmp_path / folder).mkdir(exist_ok=True)
        save_file({'x': tensor}, tmp_path / folder / name)
        return fingerprint(tmp_path / folder)

    plain = of('a')
    assert of('b') == plain
    others = {
        of('c', size=300_001),
        of('d', at=0),
        of('e', at=299_999),
        of('f', 'other.safetensors'),
        *(of(f'g{at}', at=at) for at in range(90_000, 210_000, 10_001)),  # nowhere near an end
    }
    assert len(others) == 4 + 12 and plain not in others
    of('a', 'second.safetensors')
    assert fingerprint(tmp_path / 'a') != plain


def test_internlm_shards_of_optimizers_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / 'model_tp0_pp0.pt').write_bytes(b'weights')
    plain = fingerprint(tmp_path)
    (tmp_path / 'optimizer_tp0_pp0_zo0.pt').write_bytes(b'moments')
    assert fingerprint(tmp_path) == plain
    (tmp_path / 'model_tp0_pp0.pt').write_bytes(b'wEights')
    assert fingerprint(tmp_path) != plain


def old_fingerprint(folder: Path) -> str:
    """What checkpoints held before: of each file its name, size, and 64 KiB of both ends."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob('*.safetensors')):
        content = file.read_bytes()
        digest.update(f'{file.name} {len(content)}\n'.encode())
        digest.update(content[:65536] + content[-65536:])
    return digest.hexdigest()[:32]


def test_fingerprints_of_old_are_compared_as_they_were(run, tmp_path: Path, caplog) -> None:
    hf, checkpoint = run
    file = checkpoint / 'state.json'
    state = json.loads(file.read_text())
    assert sees_all(recorded_base(checkpoint))
    state['base']['fingerprint'] = old_fingerprint(hf)
    file.write_text(json.dumps(state))
    assert not sees_all(recorded_base(checkpoint))
    assert find_base(checkpoint).path == hf
    assert 'both ends of the files of its base alone' in caplog.text
    with open(hf / 'model.safetensors', 'r+b') as weights:
        weights.seek(-1, 2)
        weights.write(b'!')
    with pytest.raises(ValueError, match='adapters of other weights than those in'):
        find_base(checkpoint)
