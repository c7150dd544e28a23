"""Options, placement and sums. That steps are right is shown in tests/parity."""

import atexit
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import distribute_tensor
from torch.optim import AdamW

from internlm_mm.datasets import RandomTokens
from internlm_mm.datasets.packing import collate_rows
from internlm_mm.models import InternLM
from internlm_mm.optim import DecayGroupsConstructor, HybridZeroOptimWrapper, WarmupCosine
from internlm_mm.parallel import HybridParallelStrategy
from internlm_mm.structures import IGNORE_INDEX, Batch

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


# ----------------------------------------------------------------------------- every kind of layout

SMALL = dict(
    vocab_size=24, hidden_size=16, intermediate_size=20, num_layers=4, num_heads=2, max_seq_len=16
)
STEPS = ('train', 'evaluate', 'load', 'evaluate', 'train', 'evaluate', 'train')
ADAMW = dict(lr=0.01, eps=1e-3)  # a large eps, or rounding in small gradients would make steps


def wide_model(seed: int) -> InternLM:
    """In float64, with weights that make every part matter."""
    built = InternLM(**SMALL)
    generator = torch.Generator().manual_seed(seed)
    for parameter in built.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    return built.double()


def micro_batches(step: int) -> list[Batch]:
    """Packed, with domains, and a different number of trained tokens in each."""
    data = RandomTokens(vocab_size=24, seq_len=16, document_lengths=[3, 5, 7], seed=2)
    found = []
    for index in range(4 * step, 4 * step + 4):
        batch = collate_rows([data[index]])
        labels = batch.labels.clone()
        labels[:, 3 + index * 5 % 12 :] = IGNORE_INDEX
        count = int((labels != IGNORE_INDEX).sum())
        domains = batch.document_ids.long() % 3
        found.append(
            replace(batch, labels=labels, num_targets=count, domain_ids=domains, num_domains=3)
        )
    return found


def by_plain_torch() -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    built = wide_model(1)
    optimizer = AdamW(
        [
            {'params': [p for p in built.parameters() if p.ndim > 1], 'weight_decay': 0.1},
            {'params': [p for p in built.parameters() if p.ndim < 2], 'weight_decay': 0.0},
        ],
        **ADAMW,
    )
    found = []
    for step, kind in enumerate(STEPS):
        if kind == 'load':
            built.load_state_dict(wide_model(2).state_dict())
            continue
        batches = micro_batches(step)
        sums = [built(batch) for batch in batches]
        if kind == 'train':
            loss = torch.stack([one['loss'] for one in sums]).sum()
            (loss / sum(batch.num_targets for batch in batches)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append({key: sum(one[key].detach() for one in sums) for key in sums[0]})
    return found, {name: p.detach() for name, p in built.named_parameters()}


def by_strategy(options: dict) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], bool]:
    built = strategy(precision={'param': 'float64', 'reduce': 'float64'}, **options)
    wrapper = OPTIM | {'optimizer': dict(type=AdamW, weight_decay=0.1, **ADAMW)}
    built.prepare(wide_model(1), optim_wrapper=wrapper)
    found = []
    for step, kind in enumerate(STEPS):
        if kind == 'load':
            whole = wide_model(2).state_dict()
            cut = {
                name: distribute_tensor(
                    whole[name], value.device_mesh, value.placements, src_data_rank=None
                )
                for name, value in built.model.state_dict().items()
            }
            built.model.load_state_dict(cut)
            continue
        batches = micro_batches(step)
        divisor = sum(batch.num_targets for batch in batches)
        share = len(batches) // built.data_world_size
        own = batches[built.data_rank * share :][:share]
        if kind == 'train':
            found.append(built.forward_backward(own, divisor))
            built.optim_wrapper.update_params()
        else:
            found.append(built.evaluate(own))
    weights = {name: p.detach().full_tensor() for name, p in built.model.named_parameters()}
    return found, weights, built.is_data_leader


LAYOUTS = [
    {'parallel': {'data_shard': 2}, 'reshard': 'never'},
    {'parallel': {'tensor': 2}, 'recompute': 1.0},
    {'parallel': {'tensor': 2}, 'recompute': 'selective'},
    {'parallel': {'context': 2}, 'recompute': 'selective'},
    {'parallel': {'tensor': 2}, 'reshard': 'never', 'offload': True},
    {'parallel': {'context': 2}, 'recompute': 0.5},
    {'parallel': {'context': 2}, 'offload': True},
    {'parallel': {'pipeline': 2}, 'reshard': 'layer', 'recompute': 1.0},
    {
        'parallel': {'pipeline': 2},
        'pipeline': {'schedule': 'interleaved_1f1b'},
        'reshard': 'never',
    },
    {'parallel': {'pipeline': 2}, 'pipeline': {'schedule': 'zbv_zero_bubble'}, 'offload': True},
]


@pytest.mark.parametrize('options', LAYOUTS, ids=str)
def test_steps_evaluation_and_new_weights(two_ranks, options: dict) -> None:
    """Nothing stale: parameters are gathered anew after an update and after they were loaded."""
    expected, weights = by_plain_torch()
    ranks = two_ranks(by_strategy, options)
    for found, held, _ in ranks:
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                torch.testing.assert_close(ours[key], value.double(), rtol=1e-9, atol=1e-9)
        for name, value in held.items():
            assert (value - weights[name]).norm() < 1e-9 * weights[name].norm(), name
    assert set().union(*(held for _, held, _ in ranks)) == weights.keys()
    alone = 'data_shard' not in options['parallel']
    assert [is_leader for _, _, is_leader in ranks] == [True, not alone]


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
