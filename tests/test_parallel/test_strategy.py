"""Options and placement. That steps are right is shown in test_step.py and in tests/parity."""

import os
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from internlm_mm.datasets import RandomTokens
from internlm_mm.datasets.packing import collate_rows
from internlm_mm.optim import WarmupCosine
from tests.strategies import MODEL, OPTIM, strategy


@pytest.fixture
def no_group_left_behind():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'reshard': 'always'}, r"strategy\.reshard='always'.*(layer|never|step)"),
        ({'precision': {'params': 'float32'}}, r"precision\.params='float32'.*'param'"),
        ({'precision': {'param': 'bf16'}}, "'bf16' is not a floating-point dtype"),
        ({'precision': {'reduce': 'int64'}}, "'int64' is not"),
        ({'auto_scale_lr': {'enable': True}}, 'auto_scale_lr'),
        ({'parallel': {'data_shard': 4}}, 'there are 1'),
        (
            {'env_kwargs': {'dist_cfg': {'time_out': 3}}},
            r'dist_cfg\.time_out=3 is unknown.*timeout',
        ),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strategy(**options)


def test_recompute_is_checked_when_the_model_is_there() -> None:
    with pytest.raises(ValueError, match='recompute=2'):
        strategy(recompute=2).prepare(dict(MODEL))


def test_a_top_level_compile_is_refused() -> None:
    with pytest.raises(ValueError, match=r'strategy\.compile=True'):
        strategy().prepare(dict(MODEL), compile=True)


@pytest.mark.parametrize(
    ('device', 'expected'), [('cuda:0', 'expandable_segments:True'), ('cpu', None)]
)
def test_gpu_memory_grows_before_a_gpu_is_touched(
    monkeypatch: pytest.MonkeyPatch, device: str, expected: str | None
) -> None:
    environ = {key: value for key, value in os.environ.items() if 'ALLOC_CONF' not in key}
    monkeypatch.setattr(os, 'environ', environ)
    seen: list[str | None] = []

    def touch(*_: object) -> NoReturn:
        seen.append(environ.get('PYTORCH_ALLOC_CONF'))
        raise InterruptedError

    monkeypatch.setattr('internlm_mm.parallel.strategy.pick_device', lambda _: torch.device(device))
    monkeypatch.setattr(torch.cuda, 'set_device', touch)
    monkeypatch.setattr('internlm_mm.parallel.strategy.join_process_group', touch)
    with pytest.raises(InterruptedError):
        strategy()
    assert seen == [expected]


def test_models_are_built_without_memory() -> None:
    built = strategy()
    module = built.build_model({**MODEL, 'vocab_size': 10**9})
    assert all(parameter.is_meta for parameter in module.parameters())


def test_one_fp32_process_is_plain_torch() -> None:
    built = strategy()
    module = built.prepare(dict(MODEL))
    assert built.mesh is None and not dist.is_initialized()
    assert not isinstance(module, FSDPModule)
    assert {type(parameter) for parameter in module.parameters()} == {nn.Parameter}
    assert (built.data_rank, built.data_world_size) == (0, 1)


def test_one_process_in_bf16_keeps_fp32_masters(no_group_left_behind) -> None:
    built = strategy(precision={'param': 'bfloat16'})
    module, _ = built.prepare(dict(MODEL), optim_wrapper=dict(OPTIM))
    assert isinstance(module, FSDPModule)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    seen = []
    module.layers['0'].register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    rows = RandomTokens(vocab_size=32, seq_len=8)
    batch = collate_rows([rows[0], rows[1]])
    before = {n: p.detach().full_tensor().clone() for n, p in module.named_parameters()}
    built.forward_backward([batch], batch.num_targets)
    built.optim_wrapper.update_params()
    assert seen == [torch.bfloat16]
    after = {n: p.detach().full_tensor() for n, p in module.named_parameters()}
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert all(not torch.equal(after[name], before[name]) for name in before)


def test_float64_is_float64_throughout() -> None:
    built = strategy(precision={'param': 'float64', 'reduce': 'float64'})
    module = built.prepare(dict(MODEL))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float64}


def test_prepare_twice_changes_nothing() -> None:
    built = strategy()
    first = built.prepare(dict(MODEL), optim_wrapper=dict(OPTIM))
    assert built.prepare(dict(MODEL), optim_wrapper=dict(OPTIM)) == first


def test_schedules_count_steps_and_know_the_length_of_the_run() -> None:
    built = strategy()
    built.prepare(
        dict(MODEL),
        optim_wrapper=dict(OPTIM),
        param_scheduler=dict(type=WarmupCosine, warmup=2),
        dispatch_kwargs={'max_iters': 50},
    )
    (schedule,) = built.param_schedulers
    assert schedule.total == 50
    assert not schedule.by_epoch


def test_by_epoch_is_refused() -> None:
    with pytest.raises(ValueError, match=r'param_scheduler\.0\.by_epoch=True'):
        strategy().prepare(
            dict(MODEL),
            optim_wrapper=dict(OPTIM),
            param_scheduler=dict(type=WarmupCosine, warmup=2, by_epoch=True),
            dispatch_kwargs={'max_iters': 50},
        )


def refused(options: dict, micro_batches: int) -> str:
    built = strategy(**options)
    with pytest.raises(ValueError) as caught:
        built.check_fit(built.build_model(dict(MODEL)), 8, micro_batches)
    return str(caught.value)


@pytest.mark.parametrize(
    ('options', 'micro_batches', 'words'),
    [
        ({'parallel': {'pipeline': 2}}, 1, ('pipeline=2', '1 micro-batch on')),
        (
            {'parallel': {'pipeline': 2}, 'pipeline': {'schedule': 'interleaved_1f1b'}},
            2,
            ('4 stages', 'has 2', 'Nearest: parallel=dict(data_shard=2)'),
        ),
    ],
    ids=str,
)
def test_ranks_refuse_together(two_ranks, options, micro_batches, words) -> None:
    first, second = two_ranks(refused, options, micro_batches)
    assert first == second
    for word in words:
        assert word in first


def context_without_attention() -> str:
    built = strategy(parallel={'context': 2}, attention='reference')
    with pytest.raises(ValueError) as caught:
        built.prepare(dict(MODEL))
    return str(caught.value)


def test_context_without_an_attention_for_it(two_ranks) -> None:
    for message in two_ranks(context_without_attention):
        assert "attention='reference' does not work with strategy.parallel.context=2" in message
