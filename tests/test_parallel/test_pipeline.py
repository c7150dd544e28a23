"""Cuts, and micro-batches sent through two ranks, against the whole model in one process."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import schedules

from internlm_mm.datasets import RandomTokens
from internlm_mm.datasets.packing import collate_rows
from internlm_mm.models import InternLM
from internlm_mm.parallel.pipeline import Pipeline, cut_stages
from internlm_mm.parallel.pipeline_plan import layer_names, plan_pipeline
from internlm_mm.registry import SCHEDULES
from internlm_mm.structures import IGNORE_INDEX, Batch

SIZES = dict(
    vocab_size=23, hidden_size=12, intermediate_size=14, num_layers=5, num_heads=2, max_seq_len=16
)


# ------------------------------------------------------------------------------------- cutting


def model() -> InternLM:
    """In float64, with weights wide enough that every part matters; the same in every process."""
    built = InternLM(**SIZES).double()
    generator = torch.Generator().manual_seed(5)
    for parameter in built.parameters():
        parameter.data.normal_(0.0, 0.4, generator=generator)
    return built


@pytest.mark.parametrize(
    ('name', 'ranks', 'layers'),
    [
        ('1f1b', 2, None),
        ('1f1b', 5, None),
        ('gpipe', 3, [1, 3, 1]),
        ('interleaved_1f1b', 2, [2, 1, 1, 1]),
        ('zbv_zero_bubble', 2, None),
    ],
)
def test_all_stages_together_are_the_model(name: str, ranks: int, layers: list | None) -> None:
    whole = model()
    values = dict(whole.named_parameters())
    plan = plan_pipeline(layer_names(whole), ranks, {'schedule': name, 'layers': layers})
    found: list[str] = []
    for rank in range(ranks):
        part, stages = cut_stages(whole, plan, rank)
        assert list(stages) == plan.stages_of(rank)
        held = dict(part.named_parameters())
        shared = [item for stage in stages.values() for item in stage.named_parameters()]
        assert len(shared) == len(held)
        for one, parameter in shared:
            assert held[one] is parameter, one
            assert torch.equal(parameter, values[one]), one
        found += held
        for index, stage in stages.items():
            assert tuple(stage.layers) == plan.layers[index]
            assert (stage.embed_tokens is not None) == (index == 0)
            is_last = index == plan.num_stages - 1
            assert (stage.norm is not None) == (stage.lm_head is not None) == is_last
        assert part.init_parameter is not None
    assert sorted(found) == sorted(values)  # each exactly once
    assert {name for name, _ in whole.named_parameters()} == set(values)  # it stays whole


class Scaled(nn.Module):
    """An objective that has a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize('name', ['1f1b', 'interleaved_1f1b', 'zbv_zero_bubble'])
def test_parameters_of_the_objective_are_on_the_last_stage_only(name: str) -> None:
    whole = InternLM(**SIZES, objective=Scaled())
    plan = plan_pipeline(layer_names(whole), 2, {'schedule': name})
    last = plan.rank_of(plan.num_stages - 1)
    for rank in range(2):
        part, stages = cut_stages(whole, plan, rank)
        held = dict(part.named_parameters())
        assert ('objective.scale' in held) == (rank == last)
        for index, stage in stages.items():
            names = dict(stage.named_parameters())
            assert ('objective.scale' in names) == (index == plan.num_stages - 1)


# ------------------------------------------------------------------------------------- running


def batches(count: int, rows: int, first: int = 0, domains: int = 0) -> list[Batch]:
    """Packed micro-batches in which a different number of tokens is trained."""
    names = [f'domain{index}' for index in range(domains)]
    data = RandomTokens(vocab_size=23, seq_len=16, document_lengths=[3, 5, 7], seed=2)
    found = []
    for index in range(first, first + count):
        taken = [data[index * rows + row] for row in range(rows)]
        batch = collate_rows(taken)
        labels = batch.labels.clone()
        labels[:, 4 + index * 3 % 11 :] = IGNORE_INDEX
        domain_ids = batch.document_ids.long() % domains if names else None
        found.append(
            replace(
                batch,
                labels=labels,
                num_targets=int((labels != IGNORE_INDEX).sum()),
                domain_ids=domain_ids,
                num_domains=domains,
            )
        )
    return found


# What is done, how many micro-batches, rows of each: the batch ramps up and evaluation intervenes.
STEPS = [
    ('train', 2, 1),
    ('evaluate', 1, 2),
    ('train', 4, 1),
    ('evaluate', 3, 1),
    ('evaluate', 1, 2),
    ('train', 4, 2),
    ('train', 2, 1),
]


def expected_steps(built: nn.Module) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Sums of losses and gradients of every step, by plain torch."""
    for index, (kind, count, rows) in enumerate(STEPS):
        micro = batches(count, rows, first=index)
        divisor = sum(batch.num_targets for batch in micro)
        total = torch.stack([built(batch)['loss'] for batch in micro]).sum()
        gradients: dict[str, Tensor] = {}
        if kind == 'train':
            names = [name for name, _ in built.named_parameters()]
            found = torch.autograd.grad(total / divisor, list(built.parameters()))
            gradients = dict(zip(names, found, strict=True))
        yield total.detach(), gradients


def pipeline_of(options: dict) -> tuple[Pipeline, nn.Module]:
    mesh = init_device_mesh('cpu', (2,), mesh_dim_names=('pipeline',))
    whole = model()
    plan = plan_pipeline(layer_names(whole), 2, options)
    part, stages = cut_stages(whole, plan, mesh.get_local_rank())
    device = torch.device('cpu')
    return Pipeline(stages, plan, mesh, device, 12, torch.float64, 1), part


def run_steps(options: dict) -> list[tuple[Tensor | None, dict[str, Tensor]]]:
    """Each step's sum on the rank that has it, and gradients of what is held here."""
    pipeline, part = pipeline_of(options)
    found = []
    for index, (kind, count, rows) in enumerate(STEPS):
        micro = batches(count, rows, first=index)
        divisor = sum(batch.num_targets for batch in micro)
        if kind == 'train':
            sums = pipeline.forward_backward(micro, lambda loss, n=divisor: loss / n)
        else:
            with torch.no_grad():
                sums = pipeline.evaluate(micro)
        assert len(sums) == (count if pipeline.has_loss else 0)
        total = torch.stack([one['loss'] for one in sums]).sum() if sums else None
        gradients = {n: p.grad.clone() for n, p in part.named_parameters() if p.grad is not None}
        found.append((total, gradients))
        part.zero_grad()
    return found


TORCH = ('gpipe', '1f1b', 'interleaved_1f1b', 'interleaved_zero_bubble', 'zbv_zero_bubble')
SCHEDULES_AND_CUTS = [
    *({'schedule': name} for name in TORCH),
    {'schedule': '1f1b', 'layers': [1, 4]},
    {'schedule': 'interleaved_1f1b', 'layers': [2, 1, 1, 1]},
    {'schedule': 'interleaved_1f1b', 'stages_per_rank': 1},
    {'schedule': 'interleaved_zero_bubble', 'stages_per_rank': 1},
]


def assert_equal_to_one_process(ranks: Sequence[list], built: nn.Module) -> None:
    for step, (total, gradients) in enumerate(expected_steps(built)):
        (ours,) = [rank[step][0] for rank in ranks if rank[step][0] is not None]
        torch.testing.assert_close(ours, total, rtol=1e-12, atol=0)
        together = {name: g for rank in ranks for name, g in rank[step][1].items()}
        assert together.keys() == gradients.keys(), step
        assert sum(len(rank[step][1]) for rank in ranks) == len(together)
        for name, gradient in gradients.items():
            distance = (together[name] - gradient).norm() / gradient.norm()
            assert distance < 1e-12, (step, name)


@pytest.mark.parametrize(
    'options', SCHEDULES_AND_CUTS, ids=lambda o: '-'.join(map(str, o.values()))
)
def test_two_ranks_compute_what_one_does(two_ranks, options: dict) -> None:
    assert_equal_to_one_process(two_ranks(run_steps, options), model())


class Counted(schedules.Schedule1F1B):
    """Not torch's own class; notes that it ran."""

    steps = 0

    def _step_microbatches(self, *args, **kwargs):
        type(self).steps += 1
        return super()._step_microbatches(*args, **kwargs)


def run_a_schedule_of_our_own() -> tuple[list, int]:
    Counted.steps = 0
    SCHEDULES.register_module(name='counted', module=Counted)
    try:
        return run_steps({'schedule': 'counted'}), Counted.steps
    finally:
        SCHEDULES.module_dict.pop('counted')


def test_a_schedule_registered_from_outside_is_the_one_that_runs(two_ranks) -> None:
    answers = two_ranks(run_a_schedule_of_our_own)
    assert_equal_to_one_process([found for found, _ in answers], model())
    trained = sum(kind == 'train' for kind, _, _ in STEPS)
    assert [steps for _, steps in answers] == [trained, trained]


def what_is_summed(options: dict) -> tuple[bool, dict[str, Tensor], dict[str, Tensor]]:
    pipeline, _ = pipeline_of(options)
    micro = batches(2, 1, domains=3)
    with torch.no_grad():
        sums = pipeline.evaluate(micro)
    first = pipeline.share_shapes(sums[0] if sums else {}, 'train')
    # Evaluation sums something else: shapes are kept by kind.
    other = pipeline.share_shapes({'loss': torch.ones(())} if sums else {}, 'evaluate')
    again = pipeline.share_shapes(sums[0] if sums else {}, 'train')
    assert again.keys() == first.keys()
    assert other.keys() == {'loss'}
    return pipeline.has_loss, first, other


@pytest.mark.parametrize('name', ['1f1b', 'zbv_zero_bubble'])
def test_ranks_without_a_loss_learn_what_there_is_to_sum(two_ranks, name: str) -> None:
    answers = two_ranks(what_is_summed, {'schedule': name})
    assert [has_loss for has_loss, _, _ in answers] == [name != '1f1b', name == '1f1b']
    expected = model()(batches(1, 1, domains=3)[0])
    for has_loss, sums, _ in answers:
        assert {key: value.shape for key, value in sums.items()} == {
            key: value.shape for key, value in expected.items()
        }
        for key, value in sums.items():
            if has_loss:
                torch.testing.assert_close(value, expected[key].detach())
            else:
                assert torch.count_nonzero(value) == 0


def test_cutting_leaves_the_whole_model_as_it_was() -> None:
    whole = model()
    before = deepcopy(whole.state_dict())
    cut_stages(whole, plan_pipeline(layer_names(whole), 2, None), 1)
    assert whole.state_dict().keys() == before.keys()


def test_a_rank_that_sends_to_itself_needs_a_newer_torch_on_cpus(monkeypatch) -> None:
    monkeypatch.setattr(torch, '__version__', '2.11.0')
    plan = plan_pipeline(['0', '1', '2', '3'], 2, {'schedule': 'zbv_zero_bubble'})
    with pytest.raises(ValueError, match=r'needs torch 2\.13 or newer, this is 2\.11\.0'):
        Pipeline({}, plan, None, torch.device('cpu'), 8, torch.float32, 1)  # type: ignore[arg-type]
