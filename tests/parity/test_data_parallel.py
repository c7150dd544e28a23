"""Every layout trains like plain torch on one process: losses, every gradient, weights.

The reference below is written out with nothing but the model, torch's AdamW and a clip by hand,
over the whole global batch at once. The data is made to trip a mean of means: packed documents, and
a number of trained tokens that differs from row to row, from rank to rank, from micro-batch to
micro-batch.
"""

import shutil
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from internlm_mm.datasets import RandomTokens, TokenLoader
from internlm_mm.datasets.packing import Row, collate_rows
from internlm_mm.models import InternLM
from internlm_mm.optim import DecayGroupsConstructor, HybridZeroOptimWrapper
from internlm_mm.parallel import HybridParallelStrategy
from internlm_mm.parallel.data import begin_micro_batch
from internlm_mm.structures import IGNORE_INDEX
from tests.ranks import Ranks

STEPS, ROWS, MICRO_ROWS = 3, 8, 2  # on two ranks two micro-batches each, on one rank four
# A large eps, or Adam would make whole steps of the rounding in gradients that are nearly zero.
LR, DECAY, BETAS, EPS, MAX_NORM = 1e-2, 0.1, (0.9, 0.95), 1e-3, 0.3
SEQ, VOCAB = 24, 37
MODEL = dict(  # odd sizes, so that two ranks cannot halve every tensor
    vocab_size=VOCAB,
    hidden_size=20,
    intermediate_size=27,
    num_layers=3,
    num_heads=2,
    max_seq_len=SEQ,
)


class UnevenRows(RandomTokens):
    """Packed rows of which a different share is trained."""

    def __init__(self) -> None:
        super().__init__(vocab_size=VOCAB, seq_len=SEQ, document_lengths=[3, 5, 11], seed=21)

    def __getitem__(self, index: int) -> Row:
        row = super().__getitem__(index)
        labels = row.labels.copy()
        labels[1 + index * 11 % SEQ :] = IGNORE_INDEX
        return replace(row, labels=labels)


def weights() -> dict[str, Tensor]:
    """Far wider than InternLM's own, so that every part of the model matters to the loss."""
    generator = torch.Generator().manual_seed(3)
    with torch.device('meta'):
        shapes = {name: p.shape for name, p in InternLM(**MODEL).named_parameters()}
    return {
        name: (1.0 if 'norm' in name else 0.0)
        + 0.15 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def model(dtype: torch.dtype) -> InternLM:
    built = InternLM(**MODEL).to(dtype)
    built.load_state_dict(weights())
    return built


def reference(dtype: torch.dtype) -> dict:
    """Losses, gradients before the clip, norms and final weights; plain torch."""
    built, rows = model(dtype), UnevenRows()
    matrices = [p for p in built.parameters() if p.ndim >= 2]
    vectors = [p for p in built.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{'params': matrices, 'weight_decay': DECAY}, {'params': vectors, 'weight_decay': 0.0}],
        lr=LR, betas=BETAS, eps=EPS, foreach=False,
    )  # fmt: skip
    losses, gradients, norms, targets = [], [], [], []
    for step in range(STEPS):
        batch = collate_rows([rows[step * ROWS + row] for row in range(ROWS)])
        loss = built(batch)['loss'] / int((batch.labels != IGNORE_INDEX).sum())
        loss.backward()
        losses.append(loss.item())
        targets.append([int(n) for n in (batch.labels != IGNORE_INDEX).sum(1)])
        gradients.append({name: p.grad.clone() for name, p in built.named_parameters()})
        norm = sum(p.grad.double().square().sum() for p in built.parameters()).sqrt().item()
        norms.append(norm)
        for parameter in built.parameters():
            parameter.grad *= min(1.0, MAX_NORM / (norm + 1e-6))
        optimizer.step()
        optimizer.zero_grad()
    return {
        'losses': losses, 'gradients': gradients, 'norms': norms, 'targets': targets,
        'weights': {name: p.detach().clone() for name, p in built.named_parameters()},
    }  # fmt: skip


def whole(tensor: Tensor) -> Tensor:
    # A copy: what is sharded over one rank only would be handed out as it is, and then clipped.
    return (tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor).clone()


def training(options: dict, fault: str | None = None, micro_rows: int = MICRO_ROWS) -> dict:
    """The same steps through strategy, wrapper and loader."""
    with tempfile.TemporaryDirectory() as folder, FAULTS[fault]():
        strategy = HybridParallelStrategy(
            **options, work_dir=folder,
            log_kwargs={'log_level': 'WARNING'}, experiment_name=Path(folder).name,
            env_kwargs={'launcher': 'none', 'randomness': {'seed': 5}},
        )  # fmt: skip
        built = model(torch.float64 if strategy.param_dtype == torch.float64 else torch.float32)
        strategy.prepare(
            built,
            optim_wrapper=dict(
                type=HybridZeroOptimWrapper, constructor=DecayGroupsConstructor,
                optimizer=dict(
                    type=torch.optim.AdamW, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY,
                    fused=True,
                ),
                clip_grad=dict(max_norm=MAX_NORM),
            ),
        )  # fmt: skip
        loader = TokenLoader(
            UnevenRows(), global_batch_size=ROWS, micro_batch_size=micro_rows,
            data_rank=strategy.data_rank, data_world_size=strategy.data_world_size,
        )  # fmt: skip
        losses, gradients, norms = [], [], []
        for _, batches in zip(range(STEPS), loader, strict=False):
            assert len(batches) > 1  # accumulation
            (targets,) = strategy.sum_over_ranks([sum(batch.num_targets for batch in batches)])
            sums = strategy.forward_backward(batches, targets)
            losses.append(sums['loss'].item() / targets)
            gradients.append({n: whole(p.grad) for n, p in strategy.model.named_parameters()})
            norms.append(strategy.optim_wrapper.update_params()['grad_norm'])
        return {
            'losses': losses, 'gradients': gradients, 'norms': norms,
            'weights': {n: whole(p.detach()) for n, p in strategy.model.named_parameters()},
        }  # fmt: skip


def distances(result: dict, expected: dict) -> dict[str, float]:
    """Relative distance of everything that was computed, by name."""
    found = {}
    for step in range(STEPS):
        for key in ('losses', 'norms'):
            one, two = result[key][step], expected[key][step]
            found[f'{key} of step {step}'] = abs(one - two) / abs(two)
        for name, two in expected['gradients'][step].items():
            one = result['gradients'][step][name].double()
            found[f'gradient of {name}, step {step}'] = ((one - two).norm() / two.norm()).item()
    for name, two in expected['weights'].items():
        one = result['weights'][name].double()
        found[f'{name} afterwards'] = ((one - two).norm() / two.norm()).item()
    return found


def assert_close(result: dict, expected: dict, tolerance: float) -> None:
    found = distances(result, expected)
    worst = max(found, key=lambda name: found[name])
    assert found[worst] <= tolerance, f'{worst} differs by {found[worst]:.1e}'


@pytest.fixture(scope='module')
def expected() -> dict:
    """The reference in float64, which float32 and bf16 are measured against, too."""
    return reference(torch.float64)


# ------------------------------------------------------------------------- planted errors


def mean_of_means():
    """Each rank divides by its own tokens, and gradients are averaged."""

    def own_share(self, values):
        return [value * dist.get_world_size() for value in values]

    return mock.patch.object(HybridParallelStrategy, 'sum_over_ranks', own_share)


def averaged_gradients():
    """FSDP2's default: divide by the number of ranks, on top of the division by all tokens."""
    return mock.patch.object(FSDPModule, 'set_gradient_divide_factor', lambda self, factor: None)


def lost_micro_batch():
    """The last micro-batch starts from nothing."""

    def begin(model, is_last, reshard):
        begin_micro_batch(model, is_last, reshard)
        if is_last:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    for entry in module._get_fsdp_state()._fsdp_param_group.fsdp_params:
                        entry.unsharded_accumulated_grad = None
                        entry._unsharded_param.grad = None

    return mock.patch('internlm_mm.parallel.step.begin_micro_batch', begin)


def norm_of_a_shard():
    """The clip sees only this rank's part of the gradient."""
    return mock.patch('internlm_mm.optim.grad_norm.dist.all_reduce', lambda *args, **kwargs: None)


def decay_of_everything():
    """Biases and norms decay, too."""
    return mock.patch.object(
        DecayGroupsConstructor, '__call__', lambda self, built: HybridZeroOptimWrapper(
            torch.optim.AdamW(built.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY),
            clip_grad=dict(max_norm=MAX_NORM),
        )
    )  # fmt: skip


FAULTS = {
    None: nullcontext,
    'mean_of_means': mean_of_means,
    'averaged_gradients': averaged_gradients,
    'lost_micro_batch': lost_micro_batch,
    'norm_of_a_shard': norm_of_a_shard,
    'decay_of_everything': decay_of_everything,
}


# ---------------------------------------------------------------------------------- tests

FLOAT64 = {'param': 'float64', 'reduce': 'float64'}
SHARD, REPLICATE = {'data_shard': 2}, {'data_replicate': 2}


def test_the_data_trips_a_mean_of_means(expected: dict) -> None:
    for targets in expected['targets']:
        micro = [sum(targets[start : start + MICRO_ROWS]) for start in range(0, ROWS, MICRO_ROWS)]
        assert len(set(micro)) == len(micro)  # all micro-batches differ,
        assert sum(micro[:2]) != sum(micro[2:])  # and the ranks
    assert all(norm > 2 * MAX_NORM for norm in expected['norms'])  # the clip bites


def test_float32_reference_agrees_with_float64(expected: dict) -> None:
    assert_close(reference(torch.float32), expected, 1e-5)


ONE_PROCESS = [
    ({'precision': FLOAT64}, 1e-9),
    ({'precision': FLOAT64, 'recompute': 0.5}, 1e-9),
    ({}, 1e-5),
    ({'attention': 'reference'}, 1e-5),
]


@pytest.mark.parametrize(('options', 'tolerance'), ONE_PROCESS, ids=str)
def test_one_process(expected: dict, options: dict, tolerance: float) -> None:
    assert_close(training(options), expected, tolerance)


@pytest.mark.slow
@pytest.mark.filterwarnings('default')  # torch's compiler warns of what it does itself
@pytest.mark.skipif(shutil.which('g++') is None, reason='torch.compile needs a compiler on CPUs')
@pytest.mark.parametrize('recompute', [0.0, 0.5, 'selective'])
def test_compiled(expected: dict, recompute: float | str) -> None:
    assert_close(training({'compile': True, 'recompute': recompute}), expected, 1e-5)


TWO_PROCESSES = [
    ({'parallel': SHARD, 'precision': FLOAT64}, 1e-9),
    ({'parallel': REPLICATE, 'precision': FLOAT64}, 1e-9),
    ({'parallel': SHARD, 'precision': FLOAT64, 'reshard': 'layer'}, 1e-9),
    ({'parallel': SHARD, 'precision': FLOAT64, 'recompute': 0.5}, 1e-9),
    ({'parallel': REPLICATE, 'precision': FLOAT64, 'reshard': 'layer', 'recompute': 1.0}, 1e-9),
    ({'parallel': SHARD}, 1e-5),
    ({'parallel': REPLICATE}, 1e-5),
]


@pytest.mark.parametrize(('options', 'tolerance'), TWO_PROCESSES, ids=str)
def test_two_processes(two_ranks, expected: dict, options: dict, tolerance: float) -> None:
    for result in two_ranks(training, options):
        assert_close(result, expected, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize('reshard', ['step', 'layer'])
def test_four_processes_sharded_and_replicated(
    tmp_path: Path, expected: dict, reshard: str
) -> None:
    ranks = Ranks(tmp_path, world_size=4)
    parallel = {'data_replicate': 2, 'data_shard': 2}
    options = {'parallel': parallel, 'precision': FLOAT64, 'reshard': reshard, 'recompute': 0.5}
    try:
        for result in ranks(training, options, None, 1):
            assert_close(result, expected, 1e-9)
    finally:
        ranks.close()


@pytest.mark.parametrize('parallel', [SHARD, REPLICATE], ids=str)
def test_bf16_is_as_close_as_bf16_can_be(two_ranks, expected: dict, parallel: dict) -> None:
    """Each rounding is off by up to 2 ** -9; the worst are gradients that are nearly zero."""
    options = {'parallel': parallel, 'precision': {'param': 'bfloat16', 'reduce': 'float32'}}
    for result in two_ranks(training, options):
        found = distances(result, expected)
        assert max(v for k, v in found.items() if k.startswith('losses')) < 5e-3
        assert max(v for k, v in found.items() if k.startswith('norms')) < 2e-2
        assert max(v for k, v in found.items() if k.endswith('step 0') and 'grad' in k) < 0.1
        assert max(found.values()) < 0.2  # a lost micro-batch or rank makes 0.5 and more


FAULTY = [
    ('mean_of_means', SHARD),
    ('averaged_gradients', SHARD),
    ('averaged_gradients', REPLICATE),
    ('lost_micro_batch', SHARD),
    ('norm_of_a_shard', SHARD),
    ('decay_of_everything', REPLICATE),
]


@pytest.mark.parametrize(('fault', 'parallel'), FAULTY, ids=str)
def test_the_comparison_can_fail(two_ranks, expected: dict, fault: str, parallel: dict) -> None:
    result = two_ranks(training, {'parallel': parallel, 'precision': FLOAT64}, fault)[0]
    with pytest.raises(AssertionError, match='differs by'):
        assert_close(result, expected, 1e-5)  # even the loosest tolerance in use
