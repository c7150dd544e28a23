"""The bare loop is a fair opponent: the framework's step, and nothing of ours but the model."""

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from internlm_mm.registry import ATTENTIONS
from internlm_mm.utils.shards import local_tensor
from tests.helpers import tiny_config, tiny_runner
from tests.ranks import Ranks

FILE = Path(__file__).parents[2] / 'tools' / 'bare_loop.py'


def load() -> ModuleType:
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


def compare(folder: str, param: str, attention: str) -> None:
    """Same batches from the same weights at a constant rate: the same losses and weights."""
    changes = dict(
        val_dataloader=None,
        val_cfg=None,
        param_scheduler=[],
        strategy__precision=dict(param=param),
        strategy__attention=attention,
    )
    runner = tiny_runner(Path(folder), **changes)
    runner.prepare_training()
    config, strategy = tiny_config(Path(folder), **changes), runner.strategy
    model, optimizer = dict(config.model), dict(config.optim_wrapper.optimizer)
    del optimizer['type']
    loop = load().BareLoop(
        model.pop('type').__name__,
        model,
        torch.device('cpu'),
        optimizer=optimizer,
        max_norm=config.optim_wrapper.clip_grad.max_norm,
        dtypes=strategy.mesh and (strategy.param_dtype, strategy.reduce_dtype),
        compile=False,
        attend=ATTENTIONS.get(attention),
    )
    ours, theirs = runner.model.state_dict(), loop.model.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        local_tensor(theirs[name]).copy_(local_tensor(value))
    losses = []
    runner.train_loop.dataloader.seek(0, 0)
    for _, batches in zip(range(4), runner.train_loop.dataloader, strict=False):
        (targets,) = strategy.sum_over_ranks([sum(batch.num_targets for batch in batches)])
        sums = strategy.forward_backward(batches, targets)
        runner.optim_wrapper.update_params()
        losses.append(sums['loss'].item() / targets)
        assert sum_of(loop.step(batches)) == pytest.approx(losses[-1], rel=1e-6)
    assert len(set(losses)) == 4
    for name, value in ours.items():
        torch.testing.assert_close(
            local_tensor(theirs[name]), local_tensor(value), rtol=1e-5, atol=1e-6
        )


def sum_of(share: float) -> float:
    """Of all ranks' shares of a loss."""
    total = torch.tensor(share, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item()


def test_its_steps_are_the_framework_s(tmp_path: Path) -> None:
    compare(str(tmp_path), 'float32', 'sdpa')


@pytest.mark.parametrize('param', ['float32', 'bfloat16'])
def test_its_steps_on_two_ranks_are_the_framework_s(
    two_ranks: Ranks, tmp_path: Path, param: str
) -> None:
    two_ranks(compare, str(tmp_path), param, 'sdpa')


def test_it_attends_as_it_is_told(two_ranks: Ranks, tmp_path: Path) -> None:
    """The reference rounds once less in bf16: another attention would be other losses."""
    two_ranks(compare, str(tmp_path), 'bfloat16', 'reference')
