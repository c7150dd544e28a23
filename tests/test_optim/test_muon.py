"""Muon against torch's own on one process, and a loop in float64 on every layout."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Muon

from internlm_mm.datasets import RandomTokens
from internlm_mm.datasets.packing import collate_rows
from internlm_mm.models import InternLM
from internlm_mm.optim import (
    DecayGroupsConstructor,
    HybridZeroOptimWrapper,
    MuonAdamW,
    WarmupCosine,
    muon,
)
from internlm_mm.optim.muon import COEFFICIENTS, orthogonalize
from internlm_mm.parallel import HybridParallelStrategy
from internlm_mm.utils.config import load_config
from internlm_mm.utils.config_reader import shipped_configs
from tests.helpers import tiny_runner
from tests.marks import slow
from tests.ranks import Ranks
from tests.strategies import scratch_folder

SIZES = dict(
    vocab_size=24, hidden_size=16, intermediate_size=20, num_layers=2, num_heads=2, max_seq_len=16
)
OPTIONS = dict(lr=0.02, weight_decay=0.1, momentum=0.9, betas=(0.9, 0.95), eps=1e-3)
STEPS = 4


@pytest.fixture(scope='module')
def four_ranks(tmp_path_factory: pytest.TempPathFactory):
    ranks = Ranks(tmp_path_factory.mktemp('ranks'), 4)
    yield ranks
    ranks.close()


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def built_model(dtype: torch.dtype = torch.float64) -> InternLM:
    """With weights that make every part matter."""
    module = InternLM(**SIZES)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    return module.to(dtype)


def batches_of(step: int) -> list:
    data = RandomTokens(vocab_size=24, seq_len=16, document_lengths=[3, 5, 7], seed=2)
    return [collate_rows([data[index]]) for index in range(4 * step, 4 * step + 4)]


def divisor_of(step: int) -> int:
    return sum(batch.num_targets for batch in batches_of(step))


def gradients_of(module: nn.Module, step: int) -> None:
    loss = torch.stack([module(batch)['loss'] for batch in batches_of(step)]).sum()
    (loss / divisor_of(step)).backward()


def by_singular_values(matrix: Tensor, steps: int = 5) -> Tensor:
    """The iteration works on singular values alone, so do it on them."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag(values) @ right


def is_matrix(name: str, value: Tensor) -> bool:
    return name.startswith('layers.') and value.ndim == 2


def by_hand(steps: int, **options) -> dict[str, Tensor]:
    """The update of both papers, written out in float64."""
    o = OPTIONS | options
    module, state = built_model(), {}
    for step in range(steps):
        gradients_of(module, step)
        for name, p in module.named_parameters():
            g, w = p.grad, p.data
            first, second = state.setdefault(name, (torch.zeros_like(w), torch.zeros_like(w)))
            if is_matrix(name, p):
                first.mul_(o['momentum']).add_(g, alpha=1 - o['momentum'])
                direction = (1 - o['momentum']) * g + o['momentum'] * first
                rate = o.get('matrix_lr', o['lr'])
                size = 0.2 * math.sqrt(max(w.shape))
                if o.get('adjust_lr') == 'original':
                    size = math.sqrt(max(1.0, w.shape[0] / w.shape[1]))
                w *= 1 - rate * o['weight_decay']
                w -= rate * size * by_singular_values(direction)
            else:
                w *= 1 - o['lr'] * (o['weight_decay'] if p.ndim > 1 else 0.0)
                first.mul_(o['betas'][0]).add_(g, alpha=1 - o['betas'][0])
                second.mul_(o['betas'][1]).add_(g * g, alpha=1 - o['betas'][1])
                mean = first / (1 - o['betas'][0] ** (step + 1))
                root = (second / (1 - o['betas'][1] ** (step + 1))).sqrt() + o['eps']
                w -= o['lr'] * mean / root
            p.grad = None
    return {name: p.detach() for name, p in module.named_parameters()}


def strategy_of(options: dict, precision: str) -> HybridParallelStrategy:
    folder = scratch_folder()
    return HybridParallelStrategy(
        work_dir=folder,
        experiment_name=folder.replace('/', '_'),
        log_kwargs={'log_level': 'WARNING'},
        env_kwargs={'launcher': 'none', 'randomness': {'seed': 3}},
        precision=dict(param=precision, reduce=precision),
        **options,
    )


def trained(options: dict, precision: str, optimizer: dict) -> tuple[dict, dict]:
    """Weights and the optimizer's state after some steps, whole."""
    strategy = strategy_of(options, precision)
    config = dict(
        type=HybridZeroOptimWrapper,
        constructor=DecayGroupsConstructor,
        optimizer=dict(type=MuonAdamW, **OPTIONS, **optimizer),
    )
    strategy.prepare(built_model(getattr(torch, precision)), optim_wrapper=config)
    for step in range(STEPS):
        rows = batches_of(step)
        share = len(rows) // strategy.data_world_size
        own = rows[strategy.data_rank * share :][:share]
        strategy.forward_backward(own, divisor_of(step))
        strategy.optim_wrapper.update_params()
    named = dict(strategy.model.named_parameters())
    state = {
        (name, kind): whole(value)
        for name, parameter in named.items()
        for kind, value in strategy.optim_wrapper.optimizer.state[parameter].items()
    }
    return {name: whole(p.detach()) for name, p in named.items()}, state


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def assert_near(found: dict, expected: dict, tolerance: float) -> None:
    for name, value in found.items():
        distance = (value.double() - expected[name]).norm()
        assert distance <= tolerance * expected[name].norm(), name


# ------------------------------------------------------------------------------- one process


@pytest.mark.parametrize('shape', [(5, 9), (9, 5), (6, 6), (1, 4)])
def test_singular_values_and_nothing_else(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    before = matrix.clone()
    found = orthogonalize(matrix)
    assert torch.equal(matrix, before)
    torch.testing.assert_close(found, by_singular_values(matrix), rtol=1e-9, atol=1e-9)
    values = torch.linalg.svdvals(found)
    assert values.max() < 1.25


@pytest.mark.parametrize('adjust_lr', ['match_rms_adamw', 'original'])
@pytest.mark.parametrize('nesterov', [True, False])
def test_is_torchs_muon_and_adamw(adjust_lr: str, nesterov: bool) -> None:
    """To the last bit, in the bfloat16 that both compute in."""
    ours, theirs = built_model(torch.float32), built_model(torch.float32)
    options = OPTIONS | dict(nesterov=nesterov, adjust_lr=adjust_lr, matrix_lr=0.01)
    config = {'optimizer': dict(type=MuonAdamW, **options)}
    wrapper = DecayGroupsConstructor(config)(ours)
    named = dict(theirs.named_parameters())
    matrices = [p for name, p in named.items() if is_matrix(name, p)]
    others = [p for name, p in named.items() if not is_matrix(name, p)]
    muon_of_torch = Muon(
        matrices,
        lr=0.01,
        weight_decay=0.1,
        momentum=0.9,
        nesterov=nesterov,
        adjust_lr_fn=adjust_lr,
    )
    groups = [
        {'params': [p for p in others if p.ndim > 1], 'weight_decay': 0.1},
        {'params': [p for p in others if p.ndim < 2], 'weight_decay': 0.0},
    ]
    adamw = AdamW(groups, lr=0.02, betas=(0.9, 0.95), eps=1e-3)
    for step in range(3):
        gradients_of(ours, step)
        gradients_of(theirs, step)
        wrapper.update_params()
        muon_of_torch.step()
        adamw.step()
        theirs.zero_grad()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, named[name]), name
        for kind, value in wrapper.optimizer.state[parameter].items():
            own = muon_of_torch if is_matrix(name, parameter) else adamw
            assert torch.equal(value, own.state[named[name]][kind]), (name, kind)


@pytest.mark.parametrize('optimizer', [{}, {'matrix_lr': 0.05}, {'adjust_lr': 'original'}], ids=str)
def test_is_the_update_of_the_papers(optimizer: dict) -> None:
    weights, _ = trained({}, 'float64', optimizer)
    assert_near(weights, by_hand(STEPS, **optimizer), 1e-9)


def test_groups_and_schedule() -> None:
    module = built_model()
    config = {'optimizer': dict(type='MuonAdamW', lr=0.1, matrix_lr=0.4, weight_decay=0.2)}
    wrapper = DecayGroupsConstructor(config)(module)
    names = {id(p): name for name, p in module.named_parameters()}
    held = [{names[id(p)] for p in group['params']} for group in wrapper.param_groups]
    assert held[0] == {name for name, p in module.named_parameters() if is_matrix(name, p)}
    assert held[1] == {'embed_tokens.weight', 'lm_head.weight'}
    assert held[2] == {name for name, p in module.named_parameters() if p.ndim == 1}
    assert [group['weight_decay'] for group in wrapper.param_groups] == [0.2, 0.2, 0.0]
    schedule = WarmupCosine(wrapper, warmup=4, end=100)
    for step in range(30):
        rates = [group['lr'] for group in wrapper.param_groups]
        factor = schedule.factor(step)
        assert rates == pytest.approx([0.4 * factor, 0.1 * factor, 0.1 * factor])
        schedule.step()


def test_frozen_and_unused_matrices_stay() -> None:
    module = built_model()
    frozen = module.layers['0'].self_attn.q_proj.weight.requires_grad_(False)
    wrapper = DecayGroupsConstructor({'optimizer': dict(type=MuonAdamW, **OPTIONS)})(module)
    unused = module.layers['1'].mlp.up_proj.weight
    before = [frozen.clone(), unused.detach().clone()]
    gradients_of(module, 0)
    unused.grad = None
    wrapper.update_params()
    assert torch.equal(frozen, before[0]) and torch.equal(unused, before[1])
    assert unused not in wrapper.optimizer.state


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            {'adjust_lr': 'match_rms_adam'},
            r"optim_wrapper\.optimizer\.adjust_lr='match_rms_adam'.*'match_rms_adamw'",
        ),
        ({'momentum': 1.5}, r'^optim_wrapper\.optimizer\.momentum=1\.5 must lie in \[0, 1\)$'),
        ({'momentum': 1.0}, r'momentum=1\.0 must lie in'),
        ({'ns_steps': 0}, r'^optim_wrapper\.optimizer\.ns_steps=0 must lie in \[1, 99\]$'),
        ({'matrix_lr': -0.1}, r'^optim_wrapper\.optimizer\.matrix_lr=-0\.1 must not be negative'),
        ({'lr': -0.1}, r'^optim_wrapper\.optimizer\.lr=-0\.1 must not be negative'),
        ({'ns_dtype': 'bf16'}, r"optim_wrapper\.optimizer\.ns_dtype='bf16'"),
        ({'betas': (1.0, 0.9)}, r'^optim_wrapper\.optimizer\.betas=\(1\.0, 0\.9\): each'),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    groups = MuonAdamW.parameter_groups(built_model())
    with pytest.raises(ValueError, match=message):
        MuonAdamW(groups, **options)


def test_what_has_no_matrices() -> None:
    with pytest.raises(ValueError, match='Linear has no trainable matrices in `layers`'):
        DecayGroupsConstructor({'optimizer': dict(type=MuonAdamW)})(nn.Linear(2, 2))
    with pytest.raises(ValueError, match='no parameter group says muon=True'):
        MuonAdamW(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match=r'\[3\], which is no matrix'):
        MuonAdamW([{'params': [nn.Parameter(torch.zeros(3))], 'muon': True}])


def test_rounds_of_any_size_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (1, 20 * 16 * 8 * 3, 2**40):
        monkeypatch.setattr(muon, 'ROUND_BYTES', size)
        found.append(trained({}, 'float64', {})[0])
    for weights in found[1:]:
        assert all(torch.equal(weights[name], value) for name, value in found[0].items())


# ------------------------------------------------------------------------------ several ranks

LAYOUTS = [
    {'parallel': {'data_shard': 2}},
    {'parallel': {'data_shard': 2}, 'reshard': 'never'},
    {'parallel': {'data_replicate': 2}},
    {'parallel': {'tensor': 2}},
    {'parallel': {'context': 2}, 'offload': True},
    {'parallel': {'pipeline': 2}},
]


@pytest.fixture(scope='module')
def expected() -> dict[str, Tensor]:
    return by_hand(STEPS)


def check(ranks: list[tuple[dict, dict]], expected: dict[str, Tensor], tolerance: float) -> None:
    for weights, state in ranks:
        assert_near(weights, expected, tolerance)
        for (name, kind), value in state.items():
            assert value.shape == (expected[name].shape if kind != 'step' else ())
    assert set().union(*(weights for weights, _ in ranks)) == expected.keys()


@pytest.mark.parametrize('options', LAYOUTS, ids=str)
def test_two_ranks(two_ranks, expected: dict, options: dict) -> None:
    check(two_ranks(trained, options, 'float64', {}), expected, 1e-9)


@pytest.mark.parametrize('parallel', [{'data_shard': 2}, slow({'tensor': 2})], ids=str)
def test_two_ranks_in_single_precision(two_ranks, expected: dict, parallel: dict) -> None:
    """fp32 has 2 ** -24 for each rounding; some thousands of them add up."""
    ranks = two_ranks(trained, {'parallel': parallel}, 'float32', {'ns_dtype': 'float32'})
    check(ranks, expected, 2e-5)


@pytest.mark.parametrize(
    'parallel',
    [
        {'data_shard': 2, 'tensor': 2},
        slow({'data_replicate': 2, 'data_shard': 2}),
        slow({'data_shard': 4}),
        slow({'pipeline': 2, 'tensor': 2}),
    ],
    ids=str,
)
def test_four_ranks(four_ranks: Ranks, expected: dict, parallel: dict) -> None:
    check(four_ranks(trained, {'parallel': parallel}, 'float64', {}), expected, 1e-9)


# -------------------------------------------------------------------------------- checkpoints

CHANGES = dict(
    val_dataloader=None,
    val_cfg=None,
    default_hooks__checkpoint=dict(type='StepCheckpointHook', interval=3),
    strategy__precision={'param': 'float64', 'reduce': 'float64'},
    optim_wrapper__optimizer=dict(type='MuonAdamW', lr=1e-2, fused=True),
)


def run(folder: str, **changes) -> dict[str, Tensor]:
    runner = tiny_runner(Path(folder), **CHANGES, **changes)
    runner.train()
    return {name: whole(p.detach()) for name, p in runner.model.named_parameters()}


def test_goes_on_from_another_layout(two_ranks, tmp_path: Path) -> None:
    alone = run(str(tmp_path / 'alone'))
    shared = {'strategy__parallel': {'tensor': 2}}
    from_one = dict(resume=str(tmp_path / 'alone' / 'iter_3'), **shared)
    for weights in two_ranks(run, str(tmp_path / 'two'), **from_one):
        assert_near(weights, alone, 1e-9)
    two_ranks(run, str(tmp_path / 'sharded'), strategy__parallel={'data_shard': 2})
    again = run(str(tmp_path / 'again'), resume=str(tmp_path / 'sharded' / 'iter_3'))
    assert_near(again, alone, 1e-9)
    # The same layout goes on to the bit.
    same = run(str(tmp_path / 'same'), resume=str(tmp_path / 'alone' / 'iter_3'))
    assert all(torch.equal(same[name], value) for name, value in alone.items())


def test_the_base_that_configs_inherit() -> None:
    config = load_config(shipped_configs() / '_base_' / 'schedules' / 'muon_cosine.py')
    module = built_model()
    wrapper = DecayGroupsConstructor({'optimizer': config.optim_wrapper.optimizer})(module)
    assert isinstance(wrapper.optimizer, MuonAdamW)
    assert [group['muon'] for group in wrapper.param_groups] == [True, False, False]
    assert {group['lr'] for group in wrapper.param_groups} == {3e-4}
    gradients_of(module, 0)
    assert wrapper.update_params()['skipped'] == 0


def test_matrices_of_adapters_are_trained_as_others(tmp_path: Path) -> None:
    optimizer = dict(type='MuonAdamW', lr=0.02, weight_decay=0.0)
    runner = tiny_runner(
        tmp_path, optim_wrapper__optimizer=optimizer, model__adapter__rank=4, randomness__seed=5
    )
    runner.train()
    groups = runner.optim_wrapper.optimizer.param_groups
    named = dict(runner.model.named_parameters())
    trained = {name for name, parameter in named.items() if parameter.requires_grad}
    assert len(groups[0]['params']) == len(trained) == 2 * 7 * 2 and groups[0]['muon']
    assert not groups[1]['params'] and not groups[2]['params']
    for name in trained:
        assert named[name].isfinite().all() and named[name].abs().sum() > 0, name
    fresh = tiny_runner(tmp_path / 'fresh', model__adapter__rank=4, randomness__seed=5)
    fresh.prepare_training()
    for name, parameter in fresh.model.named_parameters():
        assert torch.equal(parameter, named[name]) == (name not in trained), name
