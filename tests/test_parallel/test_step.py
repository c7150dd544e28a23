"""Sums of a step, and steps on every kind of layout against plain torch; see also tests/parity."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor
from torch.optim import AdamW

from internlm_mm.datasets import RandomTokens
from internlm_mm.datasets.packing import collate_rows
from internlm_mm.models import InternLM
from internlm_mm.structures import IGNORE_INDEX, Batch
from tests.marks import slow
from tests.strategies import OPTIM, strategy


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

SMALL = dict(vocab_size=24, hidden_size=16, intermediate_size=20, num_heads=2, max_seq_len=16)
STEPS = ('train', 'evaluate', 'load', 'evaluate', 'train', 'evaluate', 'train')
ADAMW = dict(lr=0.01, eps=1e-3)  # a large eps, or rounding in small gradients would make steps


def wide_model(seed: int, num_layers: int) -> InternLM:
    """In float64, with weights that make every part matter."""
    built = InternLM(**SMALL, num_layers=num_layers)
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


def by_plain_torch(num_layers: int) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    built = wide_model(1, num_layers)
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
            built.load_state_dict(wide_model(2, num_layers).state_dict())
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


def by_strategy(
    options: dict, num_layers: int
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], bool]:
    built = strategy(precision={'param': 'float64', 'reduce': 'float64'}, **options)
    wrapper = OPTIM | {'optimizer': dict(type=AdamW, weight_decay=0.1, **ADAMW)}
    built.prepare(wide_model(1, num_layers), optim_wrapper=wrapper)
    found = []
    for step, kind in enumerate(STEPS):
        if kind == 'load':
            whole = wide_model(2, num_layers).state_dict()
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
    slow({'parallel': {'tensor': 2}, 'recompute': 1.0}),
    {'parallel': {'tensor': 2}, 'recompute': 'selective'},
    {'parallel': {'context': 2}, 'recompute': 'selective'},
    {'parallel': {'tensor': 2}, 'reshard': 'never', 'offload': True},
    slow({'parallel': {'context': 2}, 'recompute': 0.5}),
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
    num_layers = 4 if 'pipeline' in options['parallel'] else 2
    expected, weights = by_plain_torch(num_layers)
    ranks = two_ranks(by_strategy, options, num_layers)
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
