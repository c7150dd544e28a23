"""The bare loop is a fair opponent: the framework's step, and nothing of ours but the model."""

import ast
import importlib.util
from pathlib import Path

import pytest
import torch

from tests.helpers import tiny_config, tiny_runner

FILE = Path(__file__).parents[2] / 'tools' / 'bare_loop.py'


@pytest.fixture(scope='module')
def bare_loop():
    spec = importlib.util.spec_from_file_location('bare_loop', FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_imports_our_models_only_and_is_short() -> None:
    text = FILE.read_text()
    assert len(text.splitlines()) < 100
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert {name for name in imported if 'internlm' in name} <= {
        'internlm_mm.models',
        'internlm_mm.ops',
    }
    assert not any('mmengine' in name for name in imported)


def test_its_steps_are_the_framework_s(bare_loop, tmp_path: Path) -> None:
    """Same batches from the same weights at a constant rate: the same losses and weights."""
    changes = dict(val_dataloader=None, val_cfg=None, param_scheduler=[])
    runner = tiny_runner(tmp_path, **changes)
    runner.prepare_training()
    config = tiny_config(tmp_path, **changes)
    model = dict(config.model)
    loop = bare_loop.BareLoop(
        model.pop('type').__name__, model, torch.device('cpu'),
        lr=config.optim_wrapper.optimizer.lr,
        max_norm=config.optim_wrapper.clip_grad.max_norm,
        sharded=False, compile=False,
    )  # fmt: skip
    loop.model.load_state_dict(runner.model.state_dict())
    losses = []
    runner.train_loop.dataloader.seek(0, 0)
    for _, batches in zip(range(4), runner.train_loop.dataloader, strict=False):
        targets = sum(batch.num_targets for batch in batches)
        sums = runner.strategy.forward_backward(batches, targets)
        runner.optim_wrapper.update_params()
        losses.append(sums['loss'].item() / targets)
        assert loop.step(batches) == pytest.approx(losses[-1], rel=1e-6)
    assert len(set(losses)) == 4
    torch.testing.assert_close(
        loop.model.state_dict(), runner.model.state_dict(), rtol=1e-5, atol=1e-6
    )
