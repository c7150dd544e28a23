"""What comes back from a checkpoint, on the same layout and on another."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from internlm_mm.checkpoint.step_folders import read_state
from internlm_mm.checkpoint.storage import StoredTensors
from internlm_mm.parallel.mesh import Layout
from tests.helpers import tiny_runner

CHANGES = dict(
    val_dataloader=None,
    val_cfg=None,
    default_hooks__checkpoint=dict(type='StepCheckpointHook', interval=2),
    strategy__precision={'param': 'float64', 'reduce': 'float64'},
)


def run(folder: Path, **changes) -> dict[str, Tensor]:
    """Train to the end; the weights whole."""
    runner = tiny_runner(folder, **{**CHANGES, **changes})
    runner.train()
    weights = {name: p.detach() for name, p in runner.model.named_parameters()}
    return {n: w.full_tensor() if hasattr(w, 'full_tensor') else w for n, w in weights.items()}


@pytest.fixture(scope='module')
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A whole run of one process, with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp('alone')
    return folder, run(folder)


def test_what_a_checkpoint_holds(alone) -> None:
    folder, weights = alone
    stored = StoredTensors(folder / 'iter_6')
    names = {f'model.{name}' for name in weights}
    names |= {
        f'optimizer.{name}.{kind}' for name in weights for kind in ('exp_avg', 'exp_avg_sq', 'step')
    }
    names |= {'rng.0.python', 'rng.0.torch'}
    assert set(stored) == names
    for name, value in weights.items():
        assert torch.equal(stored[f'model.{name}'], value)
        assert stored[f'optimizer.{name}.step'] == 6
    state = read_state(folder / 'iter_6')
    assert state['train_loop'] == {'iter': 6, 'rows': 24, 'consumed_tokens': 768}
    assert state['layout'] == Layout().as_dict()
    assert state['seed'] == 1024
    assert state['param_schedulers'] == [{'last_step': 6, '_global_step': 6}]
    assert state['optim_wrapper']['num_skipped'] == 0


@pytest.mark.parametrize('step', [2, 4])
def test_resuming_is_exact(alone, tmp_path: Path, step: int) -> None:
    folder, expected = alone
    found = run(tmp_path, resume=str(folder / f'iter_{step}'))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    first, second = (StoredTensors(path / 'iter_6') for path in (folder, tmp_path))
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name


PARALLEL = [{'data_shard': 2}, {'data_replicate': 2}]


@pytest.mark.parametrize('parallel', PARALLEL, ids=str)
def test_one_process_goes_on_as_two(two_ranks, alone, tmp_path: Path, parallel: dict) -> None:
    folder, expected = alone
    for found in two_ranks(run_on_ranks, tmp_path, parallel, str(folder / 'iter_2')):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('parallel', PARALLEL, ids=str)
def test_two_processes_go_on_as_one(two_ranks, alone, tmp_path: Path, parallel: dict) -> None:
    _, expected = alone
    two_ranks(run_on_ranks, tmp_path / 'two', parallel, False)
    state = read_state(tmp_path / 'two' / 'iter_4')
    assert state['layout'] == Layout(**parallel).as_dict()
    found = run(tmp_path / 'one', resume=str(tmp_path / 'two' / 'iter_4'))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def run_on_ranks(folder: Path, parallel: dict, resume: str | bool) -> dict[str, Tensor]:
    name = f'ranks_{folder.parent.name}_{folder.name}'
    return run(folder, strategy__parallel=parallel, resume=resume, experiment_name=name)


def test_weights_without_optimizer_cannot_be_resumed(tmp_path: Path) -> None:
    checkpoint = dict(type='StepCheckpointHook', interval=2, save_optimizer=False)
    run(tmp_path / 'a', default_hooks__checkpoint=checkpoint)
    with pytest.raises(ValueError, match='saved without optimizer state; use load_from'):
        run(tmp_path / 'b', resume=str(tmp_path / 'a' / 'iter_2'))


def test_another_model_is_refused_before_training(alone, tmp_path: Path) -> None:
    folder, _ = alone
    with pytest.raises(ValueError, match=r'checkpoint of another model.*embed_tokens'):
        run(tmp_path, resume=str(folder / 'iter_2'), model__vocab_size=128)


def test_one_process_in_bf16_goes_on_exactly(tmp_path: Path) -> None:
    """FSDP2 casts here, in a group of one that the strategy makes for it."""
    changes = dict(strategy__precision={'param': 'bfloat16', 'reduce': 'float32'})
    try:
        expected = run(tmp_path / 'a', **changes)
        found = run(tmp_path / 'b', resume=str(tmp_path / 'a' / 'iter_4'), **changes)
    finally:
        dist.destroy_process_group()
    for name, value in expected.items():
        assert value.dtype == torch.float32
        assert torch.equal(found[name], value), name
