"""Objectives over pairs: every layout and every accumulation gives one process's gradients.

The reference is the model alone, over the whole step at once. Rows hold one, two or three pairs and
some are empty, so that neither rows nor ranks nor micro-batches count alike.
"""

import shutil

import numpy as np
import pytest
import torch

from internlm_mm.datasets.packing import Row, collate_rows, untrained_row
from internlm_mm.registry import MODELS
from tests.marks import slow
from tests.strategies import OPTIM, strategy
from tests.test_models.helpers import SIZES, randomize
from tests.test_models.test_preference import pairs_of, row_of

LENGTHS = [
    [(4, 5, 3), (6, 2, 9)],
    [(9, 7, 2)],
    [(3, 1, 4), (2, 4, 4), (5, 3, 2)],
    [(3, 1, 8), (5, 4, 4)],
    [(2, 12, 12)],
    [(1, 1, 2), (3, 1, 4), (2, 4, 4)],
    [(4, 5, 3)],
    [(7, 2, 3), (1, 9, 1)],
]
LORA = dict(type='LoRA', rank=4, alpha=8.0, targets=['*_proj'])
KINDS = {
    'dpo': dict(objective=dict(type='DPO', beta=0.3, reference='precomputed', sft_weight=0.2)),
    'ipo': dict(objective=dict(type='IPO', reference='precomputed')),
    'lora': dict(objective=dict(type='DPO', beta=0.3), adapter=LORA),
    'simpo': dict(objective=dict(type='SimPO')),
    'reward': dict(objective=dict(type='PairwiseReward', center=0.1)),
    'lora_reward': dict(objective=dict(type='PairwiseReward'), adapter=LORA),
}


def rows_of(kind: str) -> list[Row]:
    draw = np.random.default_rng(7)
    needs = KINDS[kind]['objective'].get('reference') == 'precomputed'
    rows = []
    for pairs in pairs_of(LENGTHS):
        references = draw.uniform(-60, -5, 2 * len(pairs))
        rows.append(row_of(pairs, references if needs else None))
    rows[4] = untrained_row(rows[4])
    return rows


def model_of(kind: str) -> torch.nn.Module:
    model = MODELS.build(dict(type='InternLM', **SIZES, **KINDS[kind]))
    return randomize(model, 0.2).double()


def reference(kind: str) -> dict:
    model, batch = model_of(kind), collate_rows(rows_of(kind))
    sums = model(batch)
    (sums['loss'] / batch.num_targets).backward()
    return {
        'sums': {key: value.detach() for key, value in sums.items()},
        'gradients': {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
    }


def step(kind: str, micro_rows: int, parallel: dict, options: dict) -> dict:
    """One step through a strategy."""
    options = {'precision': {'param': 'float64', 'reduce': 'float64'}} | options
    built = strategy(parallel=parallel, **options)
    model = model_of(kind)
    built.prepare(
        model if built.param_dtype == torch.float64 else model.float(), optim_wrapper=OPTIM
    )
    rows, share = rows_of(kind), len(LENGTHS) // built.data_world_size
    own = rows[built.data_rank * share : (built.data_rank + 1) * share]
    batches = [collate_rows(own[i : i + micro_rows]) for i in range(0, share, micro_rows)]
    targets = sum(batch.num_targets for batch in batches) if built.is_data_leader else 0
    (divisor,) = built.sum_over_ranks([targets])
    sums = built.forward_backward(batches, divisor)
    gradients = {
        name: p.grad.full_tensor() if hasattr(p.grad, 'full_tensor') else p.grad
        for name, p in built.model.named_parameters()
        if p.grad is not None
    }
    return {'sums': sums, 'gradients': gradients, 'divisor': divisor}


def assert_same(found: dict, wanted: dict) -> None:
    assert found['divisor'] == 14
    for key, value in wanted['sums'].items():
        torch.testing.assert_close(found['sums'][key].double(), value.double(), msg=key)
    assert found['gradients'].keys() == wanted['gradients'].keys()
    for name, value in wanted['gradients'].items():
        assert value.norm() > 0, name
        error = ((found['gradients'][name] - value).norm() / value.norm()).item()
        assert error < 1e-9, f'{name}: {error:.1e}'


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('micro_rows', [1, 2, 8])
def test_accumulation(kind: str, micro_rows: int) -> None:
    assert_same(step(kind, micro_rows, {}, {}), reference(kind))


LAYOUTS = [
    (kind, parallel, options)
    for kind in KINDS
    for parallel, options in (
        ({'data_shard': 2}, {}),
        ({'data_replicate': 2}, {'recompute': 1.0}),
        ({'data_shard': 2}, {'reshard': 'layer'}),
        ({'tensor': 2}, {}),
    )
    if kind in ('dpo', 'lora', 'reward')
    or (parallel == {'data_shard': 2} and not options)
    or (parallel == {'tensor': 2} and kind == 'lora_reward')
]


# Gathering layer by layer and recomputing know nothing of the objective: one stands for all.
LAYOUTS = [slow(*layout) if layout[2] and layout[0] != 'lora' else layout for layout in LAYOUTS]


@pytest.mark.parametrize(('kind', 'parallel', 'options'), LAYOUTS, ids=str)
def test_two_processes(two_ranks, kind: str, parallel: dict, options: dict) -> None:
    wanted = reference(kind)
    for found in two_ranks(step, kind, 2, parallel, options):
        assert_same(found, wanted)


@pytest.mark.parametrize('kind', ['dpo', 'lora', 'lora_reward'])
def test_bf16_is_as_close_as_bf16_can_be(two_ranks, kind: str) -> None:
    """Log-probabilities are sums of a dozen numbers near 5, each off by up to 2 ** -9 of itself."""
    wanted = reference(kind)
    options = {'precision': {'param': 'bfloat16', 'reduce': 'float32'}}
    for found in two_ranks(step, kind, 2, {'data_shard': 2}, options):
        assert found['sums']['loss'] == pytest.approx(wanted['sums']['loss'].item(), rel=0.05)
        for name, value in wanted['gradients'].items():
            assert (found['gradients'][name] - value).norm() / value.norm() < 0.25, name


@pytest.mark.slow
@pytest.mark.filterwarnings('default')  # torch's compiler warns of what it does itself
@pytest.mark.skipif(shutil.which('g++') is None, reason='torch.compile needs a compiler on CPUs')
@pytest.mark.parametrize('kind', ['lora', 'reward'])
def test_compiled(kind: str) -> None:
    assert_same(step(kind, 2, {}, {'compile': True}), reference(kind))
