"""Adapters on layouts: gradients, lengths, frozen weights; whole layouts are in tests/parity."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from internlm_mm.models import InternLM, LoRA
from internlm_mm.parallel.adapters import (
    adapted_layers,
    check_adapters,
    check_four_bit,
    check_stages,
    left_whole,
    round_frozen,
)
from internlm_mm.parallel.mesh import Layout
from internlm_mm.registry import MODELS
from tests.strategies import MODEL, OPTIM, strategy
from tests.test_models.helpers import make_batch

ADAPTER = dict(type=LoRA, rank=3, alpha=5.0, dora=True)
FLOAT64 = {'param': 'float64', 'reduce': 'float64'}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def adapted() -> nn.Module:
    """The same on every rank; nothing in it is zero."""
    model = MODELS.build(dict(MODEL, adapter=ADAPTER)).double()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if 'magnitude' in name else 0.0, 0.3, generator=generator)
    return model


def gradients(options: dict) -> dict[str, torch.Tensor]:
    """Of one step through a strategy."""
    built = strategy(precision=FLOAT64, **options)
    built.prepare(adapted(), optim_wrapper=OPTIM)
    batch = make_batch([[10, 6]], vocab_size=32)
    built.forward_backward([batch] * 2, 2 * 14 * built.layout.data)
    return {name: whole(p.grad) for name, p in built.model.named_parameters() if p.grad is not None}


OPTIONS = [
    {'parallel': {'tensor': 2}},
    {'parallel': {'tensor': 2}, 'recompute': 1.0},
    {'parallel': {'data_shard': 2}, 'reshard': 'layer'},
    {'parallel': {'data_shard': 2}, 'reshard': 'never'},
    {'parallel': {'data_replicate': 2}},
]


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_every_gradient_is_that_of_one_process(two_ranks, options: dict) -> None:
    model, batch = adapted(), make_batch([[10, 6]], vocab_size=32)
    (model(batch)['loss'] / 14).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(expected) == 3 * 7 * MODEL['num_layers']
    for found in two_ranks(gradients, options):
        assert set(found) == set(expected)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


def lengths_and_frozen(options: dict) -> tuple[list[float], dict[str, tuple[str, bool]]]:
    """How far initial lengths are from those of the rows; what each weight is held as."""
    built = strategy(**options)
    built.prepare(dict(MODEL, adapter=ADAPTER), optim_wrapper=OPTIM)
    distances, kinds = [], {}
    for module in built.model.modules():
        if hasattr(module, 'lora_A'):
            norms = whole(module.weight.detach()).float().norm(dim=1)
            found = whole(module.lora_magnitude_vector.weight.detach())
            distances.append(float((found - norms).abs().max() / norms.max()))
    for name, parameter in built.model.named_parameters():
        kinds[name] = (str(parameter.dtype), isinstance(parameter, DTensor))
    return distances, kinds


HELD = [
    ({'parallel': {'data_shard': 2}}, True),  # frozen weights are shared out
    ({'parallel': {'data_shard': 2}, 'reshard': 'never'}, False),  # or whole on every rank
    ({'parallel': {'data_replicate': 2}}, False),
]


@pytest.mark.parametrize('options, is_shared', HELD, ids=str)
def test_frozen_weights_have_no_masters(two_ranks, options: dict, is_shared: bool) -> None:
    options = options | {'precision': {'param': 'bfloat16', 'reduce': 'float32'}}
    for distances, kinds in two_ranks(lengths_and_frozen, options):
        assert len(distances) == 7 * MODEL['num_layers'] and max(distances) < 1e-6
        for name, kind in kinds.items():
            frozen = ('torch.bfloat16', is_shared)
            assert kind == (('torch.float32', True) if '.lora_' in name else frozen), name


def test_lengths_follow_split_rows(two_ranks) -> None:
    for distances, _ in two_ranks(lengths_and_frozen, {'parallel': {'tensor': 2}}):
        assert max(distances) < 1e-6


@pytest.fixture
def meta() -> nn.Module:
    with torch.device('meta'):
        return MODELS.build(dict(MODEL, num_layers=4, adapter=ADAPTER))


def test_what_is_left_whole(meta) -> None:
    frozen = {p for p in meta.parameters() if not p.requires_grad}
    assert left_whole(meta, 1, 'step', False) == frozen
    assert left_whole(meta, 2, 'never', False) == frozen
    assert left_whole(meta, 2, 'step', False) == set()
    assert left_whole(meta, 1, 'step', True) == set()  # offloaded: fetched when needed
    plain = InternLM(**{key: value for key, value in MODEL.items() if key != 'type'})
    assert left_whole(plain, 1, 'step', False) == set()


def test_only_frozen_weights_are_rounded(meta) -> None:
    round_frozen(meta, torch.bfloat16)
    for name, parameter in meta.named_parameters():
        assert parameter.dtype == (torch.float32 if '.lora_' in name else torch.bfloat16)


def test_techniques_that_pass_adapters_by_are_refused(meta) -> None:
    with pytest.raises(ValueError, match=r'strategy\.kernels\.fuse=True does not go with m'):
        check_adapters(meta, fuse=True, float8=False)
    with pytest.raises(ValueError, match=r'strategy\.float8 does not go with model\.adapter'):
        check_adapters(meta, fuse=False, float8=True)
    check_adapters(meta, fuse=False, float8=False)
    check_adapters(nn.Linear(2, 2), fuse=True, float8=True)
    with pytest.raises(ValueError, match=r'strategy\.kernels\.fuse=True does not go with'):
        strategy(kernels={'fuse': True}).prepare(dict(MODEL, adapter=ADAPTER))


@pytest.mark.parametrize(
    'layout, options, message',
    [
        (Layout(tensor=2), {}, r'does not go with strategy\.parallel\.tensor=2'),
        (Layout(data_shard=2), {}, r"2 ranks share parameters: set .*reshard='never'"),
        (Layout(), {'offload': True}, r'does not go with strategy\.offload=True'),
        (Layout(), {'dtype': torch.float64}, r"strategy\.precision\.param='float64'"),
    ],
    ids=['tensor', 'shards', 'offload', 'float64'],
)
def test_what_four_bits_do_not_go_with(monkeypatch, meta, layout, options, message) -> None:
    monkeypatch.setattr('internlm_mm.parallel.adapters.obstacles', lambda *_: [])  # as installed
    options = {'reshard': 'step', 'offload': False, 'dtype': torch.bfloat16} | options
    check_four_bit(meta, layout, **options)
    for module in adapted_layers(meta):
        module.four_bit = True
    with pytest.raises(ValueError, match=rf'model\.adapter\.four_bit=True .*{message}'):
        check_four_bit(meta, layout, **options)
    check_four_bit(meta, Layout(pipeline=2), 'step', False, torch.bfloat16)
    check_four_bit(meta, Layout(data_shard=2), 'never', False, torch.bfloat16)


def test_every_stage_trains_something() -> None:
    with torch.device('meta'):
        adapter = dict(ADAPTER, targets=['layers.[01].*_proj'])
        model = MODELS.build(dict(MODEL, num_layers=4, adapter=adapter))
    check_stages(model, iter([('0',), ('1', '2', '3')]))
    with pytest.raises(ValueError, match=r'nothing is trained in stage 1 \(layers 2 to 3\)'):
        check_stages(model, iter([('0', '1'), ('2', '3')]))


def losses_with_dropout(dropout: float) -> list[float]:
    """Of the same rows, twice."""
    built = strategy(parallel={'data_replicate': 2})
    model = dict(MODEL, adapter=dict(ADAPTER, dropout=dropout))
    built.prepare(model, optim_wrapper=OPTIM)
    for name, parameter in built.model.named_parameters():
        if 'lora_B' in name:
            nn.init.normal_(parameter.to_local())
    batch = make_batch([[10, 6]], vocab_size=32)
    with torch.no_grad():
        return [built.model(batch)['loss'].item() for _ in range(2)]


def test_ranks_drop_different_inputs(two_ranks) -> None:
    first, second = two_ranks(losses_with_dropout, 0.5)
    assert len({*first, *second}) == 4
    first, second = two_ranks(losses_with_dropout, 0.0)
    assert len({*first, *second}) == 1
