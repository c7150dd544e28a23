"""Splits, plans and options of a pipeline, against torch's own placement of stages."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

from internlm_mm.models import InternLM
from internlm_mm.parallel.pipeline_plan import (
    check_reshard,
    even_split,
    is_v_shaped,
    layer_names,
    plan_pipeline,
    read_options,
)
from internlm_mm.registry import SCHEDULES

LAYERS = [str(index) for index in range(7)]
TORCH = {
    'gpipe': schedules.ScheduleGPipe,
    '1f1b': schedules.Schedule1F1B,
    'interleaved_1f1b': schedules.ScheduleInterleaved1F1B,
    'interleaved_zero_bubble': schedules.ScheduleInterleavedZeroBubble,
    'zbv_zero_bubble': schedules.ScheduleZBVZeroBubble,
}


@settings(deadline=None)
@given(stages=st.integers(1, 20), more=st.integers(0, 60))
def test_layers_are_split_evenly(stages: int, more: int) -> None:
    counts = even_split(stages + more, stages)
    assert len(counts) == stages and sum(counts) == stages + more
    assert max(counts) - min(counts) <= 1
    # The last stage has the head, the first one the embedding: neither is above the middle.
    assert counts[-1] == min(counts)
    assert counts[0] == min(counts) or counts[1:-1].count(min(counts)) == 0


def test_fewer_layers_than_stages() -> None:
    with pytest.raises(ValueError, match='4 stages need at least 4 layers, the model has 3'):
        even_split(3, 4)


@pytest.mark.parametrize('name', TORCH)
def test_schedules_of_torch_by_name(name: str) -> None:
    assert SCHEDULES.get(name) is TORCH[name]
    interleaves = issubclass(TORCH[name], schedules.PipelineScheduleMulti)
    assert read_options({'schedule': name}) == (name, 2 if interleaves else 1, None)


def test_the_plan_without_options() -> None:
    plan = plan_pipeline(LAYERS, 3, None)
    assert plan.schedule == '1f1b'
    assert plan.layers == (('0', '1'), ('2', '3', '4'), ('5', '6'))
    assert (plan.num_stages, plan.stages_per_rank) == (3, 1)
    assert [plan.stages_of(rank) for rank in range(3)] == [[0], [1], [2]]


def test_an_uneven_plan() -> None:
    plan = plan_pipeline(LAYERS, 2, {'schedule': 'interleaved_1f1b', 'layers': [1, 3, 2, 1]})
    assert plan.layers == (('0',), ('1', '2', '3'), ('4', '5'), ('6',))
    assert [plan.stages_of(rank) for rank in range(2)] == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ('ranks', 'name', 'per_rank'),
    [
        (4, '1f1b', 1),
        (2, 'gpipe', 1),
        (2, 'interleaved_1f1b', 3),
        (3, 'interleaved_zero_bubble', 2),
        (2, 'zbv_zero_bubble', 2),
        (3, 'zbv_zero_bubble', 2),
    ],
)
def test_stages_are_where_torch_expects_them(ranks: int, name: str, per_rank: int) -> None:
    options = {'schedule': name, 'stages_per_rank': per_rank}
    plan = plan_pipeline(LAYERS, ranks, options)
    style = 'v' if name == 'zbv_zero_bubble' else 'loop'
    expected = generate_stage_to_rank_mapping(ranks, ranks * per_rank, style)
    assert {stage: plan.rank_of(stage) for stage in range(plan.num_stages)} == expected
    for rank in range(ranks):
        assert sorted(plan.stages_of(rank)) == [s for s, r in expected.items() if r == rank]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'schedule': '1f1b '}, r"strategy\.pipeline\.schedule='1f1b ' is unknown.*'1f1b'"),
        ({'schedule': None}, r'schedule=None is unknown'),
        ({'schedul': 'gpipe'}, r"strategy\.pipeline\.schedul='gpipe' is unknown.*'schedule'"),
        ({'stages_per_rank': 2}, r"stages_per_rank=2: '1f1b' takes 1"),
        ({'schedule': 'zbv_zero_bubble', 'stages_per_rank': 3}, r'stages_per_rank=3: .* takes 2'),
        (
            {'schedule': 'interleaved_1f1b', 'stages_per_rank': 0},
            r'stages_per_rank=0: .* takes a positive int',
        ),
        ({'schedule': 'interleaved_1f1b', 'stages_per_rank': '2'}, r"stages_per_rank='2'"),
        (
            {'layers': [3, 3]},
            r'layers=\[3, 3\]: expected 2 stages \(2 ranks of 1\) of at least 1 layer, 7 in all, '
            r'as in \[4, 3\]',
        ),
        ({'layers': [7]}, r'layers=\[7\]: expected 2 stages'),
        ({'layers': [7, 0]}, r'layers=\[7, 0\]: .* at least 1 layer'),
        ({'layers': []}, r'layers=\[\]: expected 2 stages'),
    ],
)
def test_options_that_are_wrong(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_pipeline(LAYERS, 2, options)


def test_layers_need_names() -> None:
    sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=5, num_heads=2)
    assert layer_names(InternLM(**sizes)) == ['0', '1', '2', '3', '4']
    listed = nn.Module()
    listed.layers = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r'Module has no nn\.ModuleDict `layers`'):
        layer_names(listed)


def test_a_schedule_from_outside_may_be_v_shaped() -> None:
    class Straight(schedules.ScheduleInterleaved1F1B):
        """Says nothing."""

    class Bent(schedules.ScheduleInterleaved1F1B):
        """Says so."""

        v_shaped = True

    assert is_v_shaped(Bent) and not is_v_shaped(Straight)
    assert is_v_shaped(schedules.ScheduleDualPipeV) and not is_v_shaped(schedules.ScheduleGPipe)


@pytest.mark.parametrize('name', TORCH)
@pytest.mark.parametrize('reshard', ['never', 'step', 'layer'])
def test_no_resharding_between_halves_of_a_backward(name: str, reshard: str) -> None:
    plan = plan_pipeline(LAYERS, 2, {'schedule': name})
    if reshard == 'layer' and 'zero_bubble' in name:
        with pytest.raises(ValueError, match=rf"reshard='layer' .*schedule='{name}'.*'step'"):
            check_reshard(plan, reshard)
    else:
        check_reshard(plan, reshard)


@pytest.mark.parametrize('schedule', ['interleaved_zero_bubble', 'zbv_zero_bubble'])
def test_a_backward_in_parts_cannot_be_compiled(schedule: str) -> None:
    names = [str(index) for index in range(8)]
    plan_pipeline(names, 2, {'schedule': schedule})
    with pytest.raises(ValueError, match=rf'schedule={schedule!r} does not work with .*compile'):
        plan_pipeline(names, 2, {'schedule': schedule}, compiled=True)
    plan_pipeline(names, 2, {'schedule': 'interleaved_1f1b'}, compiled=True)
