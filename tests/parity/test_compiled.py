"""Layers are compiled once: accumulation, evaluation, packed rows and a resume compile nothing."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook

from internlm_mm.engine.hooks import EvaluationHook, StepCheckpointHook
from tests.helpers import tiny_config, tiny_runner

COMPILED = {'type': 'HybridParallelStrategy', 'compile': True}


class CountGraphs(Hook):
    """How many graphs there are after every step, its evaluation included."""

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.counts: list[int] = []

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        self.counts.append(torch._dynamo.utils.counters['stats']['unique_graphs'])


@pytest.mark.slow
@pytest.mark.filterwarnings('default')  # torch's compiler warns of what it does itself
@pytest.mark.skipif(shutil.which('g++') is None, reason='torch.compile needs a compiler on CPUs')
def test_nothing_is_compiled_again(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path)
    assert cfg.train_cfg.global_batch_size == 2 * cfg.train_cfg.micro_batch_size
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    hooks = {
        'evaluation': dict(type=EvaluationHook, interval=2),
        'checkpoint': dict(type=StepCheckpointHook, interval=3, async_save=False),
    }
    whole = CountGraphs()
    first = tiny_runner(
        tmp_path, [whole], strategy=COMPILED, default_hooks=hooks, model__num_layers=10
    )
    first.train()
    assert len(whole.counts) == 6
    # One graph with gradients; the evaluation after step 2 has one without.
    assert whole.counts == [1, 2, 2, 2, 2, 2]
    resumed = CountGraphs()
    changes = dict(strategy=COMPILED, default_hooks=hooks, model__num_layers=10)
    second = tiny_runner(tmp_path, [resumed], resume=str(tmp_path / 'iter_3'), **changes)
    second.train()
    assert len(resumed.counts) == 3 and len(set(resumed.counts)) == 1
    assert not counters['graph_break'] and not counters['recompile_limit']
    for (name, one), other in zip(
        first.model.named_parameters(), second.model.parameters(), strict=True
    ):
        assert torch.equal(one, other), name
