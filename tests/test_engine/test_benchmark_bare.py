from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from internlm_mm.engine import benchmark_bare
from internlm_mm.engine.benchmark_bare import attention_of, beyond_bare, check_bare
from internlm_mm.ops.attention import reference_attention
from internlm_mm.parallel.float8 import Float8
from internlm_mm.parallel.mesh import Layout
from tests.helpers import tiny_runner


@pytest.fixture(autouse=True)
def no_group_left_behind() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_what_the_bare_loop_does_as_well(tmp_path: Path) -> None:
    runner = tiny_runner(
        tmp_path,
        optim_wrapper__optimizer__lr=0.1,
        strategy__attention='reference',
        strategy__kernels={'fuse_accumulation': 'auto'},
        strategy__precision={'param': 'bfloat16', 'reduce': 'bfloat16'},
    )
    runner.strategy.layout = Layout(data_shard=8)
    check_bare(runner.cfg, runner.strategy)


@pytest.mark.parametrize(
    ('changes', 'told'),
    [
        ({'model__adapter': {'rank': 4}}, 'model.adapter'),
        ({'optim_wrapper__optimizer__type': 'SGD'}, 'optim_wrapper.optimizer.type=SGD'),
        ({'optim_wrapper__type': 'OptimWrapper'}, 'optim_wrapper.type=OptimWrapper'),
        (
            {'optim_wrapper__constructor': 'DefaultOptimWrapperConstructor'},
            'optim_wrapper.constructor=DefaultOptimWrapperConstructor',
        ),
        ({'optim_wrapper__clip_grad': None}, 'optim_wrapper.clip_grad=None'),
        ({'optim_wrapper__loss_scale': 1024}, 'optim_wrapper.loss_scale'),
        ({'strategy__precision': {'param': 'float16'}}, "strategy.precision.param='float16'"),
        ({'strategy__reshard': 'never'}, "strategy.reshard='never'"),
        ({'strategy__recompute': 'selective'}, "strategy.recompute='selective'"),
        ({'strategy__offload': True}, 'strategy.offload=True'),
        ({'strategy__kernels': {'norm': 'fused'}}, "strategy.kernels.norm='fused'"),
        (
            {'strategy__kernels': {'cross_entropy': 'liger'}},
            "strategy.kernels.cross_entropy='liger'",
        ),
        ({'strategy__kernels': {'fuse': True}}, 'strategy.kernels.fuse=True'),
    ],
    ids=str,
)
def test_what_it_does_not(tmp_path: Path, changes: dict, told: str) -> None:
    runner = tiny_runner(tmp_path)
    config = runner.cfg
    config.merge_from_dict({key.replace('__', '.'): value for key, value in changes.items()})
    options = {key: value for key, value in config.strategy.items() if key != 'type'}
    techniques = type(runner.strategy)(work_dir=str(tmp_path), **options).techniques
    runner.strategy.techniques = techniques
    with pytest.raises(ValueError) as caught:
        check_bare(config, runner.strategy)
    assert str(caught.value) == f'--against bare: the bare loop knows no {told}'


class Mine(nn.Module):
    """A model of a plug-in."""


def test_all_of_it_is_told_at_once(tmp_path: Path) -> None:
    runner = tiny_runner(tmp_path)
    config, strategy = runner.cfg, runner.strategy
    config.model.type = Mine
    strategy.techniques = replace(strategy.techniques, float8=Float8())
    strategy.layout = Layout(pipeline=2, data_replicate=3, data_shard=4, context=5, tensor=6)
    told = 'no model.type=Mine, no strategy.float8, no strategy.parallel.pipeline=2, no strategy.'
    with pytest.raises(ValueError, match=told) as caught:
        check_bare(config, strategy)
    for degree in ('data_replicate=3', 'context=5', 'tensor=6'):
        assert f'no strategy.parallel.{degree}' in str(caught.value)
    assert 'data_shard' not in str(caught.value)


def test_the_attention_of_a_run(tmp_path: Path) -> None:
    runner = tiny_runner(tmp_path, strategy__attention='reference')
    runner.prepare_training()
    assert attention_of(runner.model) is reference_attention
    assert attention_of(nn.Linear(2, 2)) is None


def test_what_a_run_has_beyond_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device('cpu'), torch.device('cuda')
    model = nn.Linear(2, 2)
    monkeypatch.setattr(benchmark_bare, 'FSDPModule', nn.Linear)
    monkeypatch.setattr(benchmark_bare, 'wide_add_kernel', lambda: None)
    assert beyond_bare(model, cpu) == beyond_bare(model, cuda) == []
    monkeypatch.setattr(benchmark_bare, 'wide_add_kernel', lambda: print)
    assert beyond_bare(model, cpu) == beyond_bare(nn.Identity(), cuda) == []
    (kernel,) = beyond_bare(model, cuda)
    model.gradient_sums = object()
    products, also = beyond_bare(model, cuda)
    assert '(fuse_accumulation)' in products and also == kernel
