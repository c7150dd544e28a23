import json
import shutil
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from internlm_mm.checkpoint import storage
from internlm_mm.checkpoint.checkpointer import Checkpointer, remove_checkpoint
from internlm_mm.checkpoint.step_folders import (
    find_checkpoint,
    list_checkpoints,
    read_config,
    read_model_state,
    read_state,
    verify,
)
from tests.saving import saved, tensors


class SlowDisk:
    """Writing waits until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.threads: list[threading.Thread] = []
        plain = storage.write_safetensors

        def write(path, items):
            self.threads.append(threading.current_thread())
            assert self.go.wait(30)
            return plain(path, items)

        monkeypatch.setattr(storage, 'write_safetensors', write)


@pytest.mark.parametrize('async_save', [False, True])
def test_save_and_load(tmp_path: Path, async_save: bool) -> None:
    checkpointer = Checkpointer(async_save)
    checkpointer.save(
        tmp_path / 'iter_5',
        tensors(),
        {'iter': 5, 'rows': torch.tensor(40), 'nested': {'list': [1, 2.5, None, 'text']}},
        texts={'config.py': 'model = 1\n', 'config.json': '{"model": 1}'},
    )
    checkpointer.finish()
    found = {name: torch.zeros_like(value) for name, value in tensors().items()}
    checkpointer.load(tmp_path / 'iter_5', found)
    for name, value in tensors().items():
        assert torch.equal(found[name], value)
    assert read_state(tmp_path / 'iter_5') == {
        'iter': 5,
        'rows': 40,
        'nested': {'list': [1, 2.5, None, 'text']},
    }
    assert read_config(tmp_path) == {'model': 1}
    assert list(read_model_state(tmp_path)) == ['weight']
    assert verify(tmp_path / 'iter_5') == []
    assert [path.name for path in tmp_path.iterdir()] == ['iter_5']


@pytest.mark.parametrize('async_save', [False, True])
def test_one_process_is_not_warned_of(tmp_path: Path, async_save: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        checkpointer = Checkpointer(async_save)
        checkpointer.save(tmp_path / 'iter_1', tensors(), {})
        checkpointer.finish()
        checkpointer.load(tmp_path / 'iter_1', tensors())
    assert [str(warning.message) for warning in caught] == []


def test_what_is_saved_is_what_was_there_when_save_returned(tmp_path: Path, monkeypatch) -> None:
    """Training goes on at once and changes weights in place, views and shared storages included."""
    disk = SlowDisk(monkeypatch)
    base = torch.arange(24.0).reshape(4, 6)
    tied = torch.arange(5.0)
    live = {
        'model.whole': base,
        'model.view': base[1:3],
        'model.transposed': base.T,
        'model.half': torch.arange(6.0).bfloat16(),
        'model.tied': tied,
        'model.tied_too': tied,
        'model.parameter': torch.nn.Parameter(torch.ones(3)),
        'optimizer.step': torch.tensor(7.0),
        'rng.0': torch.get_rng_state(),
    }
    expected = {name: value.detach().clone() for name, value in live.items()}
    checkpointer = Checkpointer()
    checkpointer.save(tmp_path / 'iter_1', live, {})
    for value in live.values():
        with torch.no_grad():
            value.zero_()
    assert not (tmp_path / 'iter_1').exists()  # the disk is still waiting
    disk.go.set()
    checkpointer.finish()
    assert disk.threads and threading.main_thread() not in disk.threads
    stored = storage.StoredTensors(tmp_path / 'iter_1')
    for name, value in expected.items():
        assert torch.equal(stored[name], value), name


def sharded_save_while_training_goes_on(path: Path) -> None:
    mesh = init_device_mesh('cpu', (2,))
    value = distribute_tensor(torch.arange(10.0).reshape(5, 2), mesh, [Shard(0)])
    go = threading.Event()
    plain = storage.write_safetensors

    def write(file, items):
        assert go.wait(30)
        return plain(file, items)

    storage.write_safetensors = write
    try:
        checkpointer = Checkpointer()
        checkpointer.save(path, {'model.weight': value}, {'rank': dist.get_rank()})
        value.to_local().zero_()
        total = torch.ones(1)
        for _ in range(20):  # training's own collectives run meanwhile
            dist.all_reduce(total)
        assert total.item() == 2.0**20
        go.set()
        checkpointer.finish()
    finally:
        storage.write_safetensors = plain


def test_the_same_on_two_ranks(two_ranks, tmp_path: Path) -> None:
    two_ranks(sharded_save_while_training_goes_on, tmp_path / 'iter_3')
    assert verify(tmp_path / 'iter_3') == []
    weight = read_model_state(tmp_path / 'iter_3')['weight']
    assert torch.equal(weight, torch.arange(10.0).reshape(5, 2))
    assert read_state(tmp_path / 'iter_3') == {'rank': 0}  # the coordinator's


def test_at_most_one_save_is_in_flight(tmp_path: Path, monkeypatch) -> None:
    disk = SlowDisk(monkeypatch)
    checkpointer = Checkpointer()
    checkpointer.save(tmp_path / 'iter_1', tensors(1.0), {})
    threading.Timer(0.2, disk.go.set).start()
    checkpointer.save(tmp_path / 'iter_2', tensors(2.0), {})
    assert (tmp_path / 'iter_1').exists()  # the second had to wait for the first
    checkpointer.finish()
    assert read_model_state(tmp_path)['weight'][0, 0] == 2.0


def test_failure_in_the_background_shows_at_finish(tmp_path: Path, monkeypatch) -> None:
    def full(path, items):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(storage, 'write_safetensors', full)
    checkpointer = Checkpointer()
    checkpointer.save(tmp_path / 'iter_1', tensors(), {})
    with pytest.raises(OSError, match=r'saving .*iter_1 failed on rank 0: .*No space left'):
        checkpointer.finish()
    checkpointer.finish()  # said once
    assert list_checkpoints(tmp_path) == []


def test_failure_in_the_background_shows_at_the_next_save(tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(storage, 'write_safetensors', lambda path, items: 1 / 0)
        checkpointer = Checkpointer()
        checkpointer.save(tmp_path / 'iter_1', tensors(), {})
        with pytest.raises(OSError, match='ZeroDivisionError'):
            checkpointer.save(tmp_path / 'iter_2', tensors(), {})
    checkpointer.save(tmp_path / 'iter_3', tensors(), {})
    checkpointer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ['iter_3']


def test_a_checkpoint_that_is_there_is_replaced(tmp_path: Path) -> None:
    saved(tmp_path / 'iter_1', 1.0)
    saved(tmp_path / 'iter_1', 2.0)
    assert read_model_state(tmp_path)['weight'][0, 0] == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ['iter_1']


def test_folders_travel_along_and_are_in_the_manifest(tmp_path: Path) -> None:
    source = tmp_path / 'source'
    (source / 'deep').mkdir(parents=True)
    (source / 'a.model').write_bytes(b'pieces')
    (source / 'deep' / 'b.json').write_text('{}')
    path = saved(tmp_path / 'iter_1', folders={'tokenizer': source})
    assert (path / 'tokenizer' / 'deep' / 'b.json').read_text() == '{}'
    files = json.loads((path / 'manifest.json').read_text())['files']
    assert {'tokenizer/a.model', 'tokenizer/deep/b.json', 'state.json', 'metadata.json'} < set(
        files
    )
    (path / 'tokenizer' / 'a.model').write_bytes(b'peaces')
    assert verify(path) == ['tokenizer/a.model is damaged: its checksum differs']


@pytest.mark.parametrize(
    'value', [{1, 2}, object(), torch.ones(2), b'bytes', Path('x')], ids=lambda v: type(v).__name__
)
def test_state_is_json_or_refused(tmp_path: Path, value) -> None:
    with pytest.raises(TypeError, match=rf'{type(value).__name__} cannot be stored in state\.json'):
        saved(tmp_path / 'iter_1', texts=None) and Checkpointer(False).save(
            tmp_path / 'iter_2', tensors(), {'hook': {'deep': value}}
        )
    assert [path.name for path in tmp_path.iterdir()] == ['iter_1']


# -------------------------------------------------------------------------- left behind


def test_left_overs_are_never_taken_for_checkpoints(tmp_path: Path) -> None:
    path = saved(tmp_path / 'iter_1')
    shutil.copytree(path, tmp_path / 'iter_2.tmp')
    assert find_checkpoint(tmp_path) == path
    saved(tmp_path / 'iter_3')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['iter_1', 'iter_3']


def test_remove(tmp_path: Path, monkeypatch) -> None:
    path = saved(tmp_path / 'iter_1')

    def killed(folder, **options):
        if not options:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, 'rmtree', killed)
        with pytest.raises(KeyboardInterrupt):
            remove_checkpoint(path)
    assert list_checkpoints(tmp_path) == []  # half removed is gone
    saved(path)
    remove_checkpoint(path)
    assert list(tmp_path.iterdir()) == []
