"""Options, placement and sums. That steps are right is shown in tests/parity."""

import atexit
import shutil
import tempfile
from collections.abc import Mapping

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import AdamW

from internlm_mm.datasets import RandomTokens
from internlm_mm.datasets.packing import collate_rows
from internlm_mm.models import InternLM
from internlm_mm.optim import DecayGroupsConstructor, HybridZeroOptimWrapper, WarmupCosine
from internlm_mm.parallel import HybridParallelStrategy
from internlm_mm.structures import Batch

MODEL = dict(
    type=InternLM, vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2
)
OPTIM = dict(
    type=HybridZeroOptimWrapper,
    constructor=DecayGroupsConstructor,
    optimizer=dict(type=AdamW, lr=0.1),
)


def strategy(**options) -> HybridParallelStrategy:
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    options.setdefault('env_kwargs', {'launcher': 'none', 'randomness': {'seed': 3}})
    return HybridParallelStrategy(
        work_dir=folder,
        experiment_name=folder.replace('/', '_'),
        log_kwargs={'log_level': 'WARNING'},
        **options,
    )


@pytest.fixture
def no_group_left_behind():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'reshard': 'never'}, r"strategy\.reshard='never'.*layer, step"),
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


class Sums(nn.Module):
    """Returns known numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, batch: Batch) -> Mapping[str, Tensor]:
        value = batch.input_ids.double().sum()
        return {
            'loss': self.weight * value.float(),
            'domain_loss': torch.stack((value, 2 * value)),
        }


def batch_of(number: int) -> Batch:
    ids = torch.full((1, 1), number)
    return Batch(
        input_ids=ids, labels=ids, position_ids=ids, document_ids=ids.int(),
        cu_seqlens=torch.tensor([[0, 1]], dtype=torch.int32), max_seqlen=1, num_targets=1,
    )  # fmt: skip


def test_a_step_sums_over_micro_batches() -> None:
    built = strategy(parallel={})
    module, _ = built.prepare(Sums(), optim_wrapper=dict(OPTIM))
    sums = built.forward_backward([batch_of(3), batch_of(4), batch_of(5)], divisor=8)
    assert sums['loss'].item() == 2 * 12
    assert sums['domain_loss'].tolist() == [12, 24]
    assert not sums['loss'].requires_grad
    assert module.weight.grad.item() == 12 / 8
    built.optim_wrapper.zero_grad()
    assert built.evaluate([batch_of(1), batch_of(2)])['loss'].item() == 2 * 3
    assert module.weight.grad is None


def sums_on_ranks() -> tuple:
    built = strategy(parallel={})
    module = Sums()
    module.weight = nn.Parameter(torch.full((2,), 2.0))
    module.forward = lambda batch: {
        'loss': (module.weight * batch.input_ids.sum()).sum(),
        'domain_loss': batch.input_ids.reshape(1).double() * 2.0**40,
    }
    built.prepare(module, optim_wrapper=dict(OPTIM))
    rank = dist.get_rank()
    sums = built.forward_backward([batch_of(1 + rank), batch_of(10)], divisor=2)
    gradient = built.model.weight.grad.full_tensor().tolist()
    counted = built.sum_over_ranks([7, 2**40 + rank])
    return built.data_rank, sums['loss'].item(), sums['domain_loss'].tolist(), gradient, counted


def test_a_step_sums_over_ranks(two_ranks) -> None:
    first, second = two_ranks(sums_on_ranks)
    assert (first[0], second[0]) == (0, 1)
    total = (1 + 10) + (2 + 10)
    for _, loss, domains, gradient, counted in (first, second):
        assert loss == 2 * 2 * total
        assert domains == [total * 2.0**40]
        assert gradient == [total / 2, total / 2]
        assert counted == [14, 2**41 + 1]
