"""Layouts: read, named, listed, refused."""

import pytest
import torch

from internlm_mm.models import InternLM
from internlm_mm.verify.layouts import (
    Case,
    deepest,
    default_cases,
    names,
    parse_case,
    why_not,
)

TEXTS = [
    'data_shard=2',
    'pipeline=2,data_replicate=2,data_shard=2,context=2,tensor=2',
    'data_shard=2,reshard=layer',
    'pipeline=2,schedule=interleaved_1f1b',
    'pipeline=2,schedule=interleaved_1f1b,stages_per_rank=3',
    'pipeline=2,layers=1/3',
    'context=2,context_attention=ring',
    'data_shard=2,offload=True',
]


@pytest.mark.parametrize('text', TEXTS)
def test_a_name_is_what_was_written(text: str) -> None:
    assert parse_case(text).name == text


def test_order_and_ones_do_not_matter() -> None:
    assert parse_case(' tensor=2, data_shard=2,context=1') == parse_case('data_shard=2,tensor=2')
    assert parse_case('one process') == parse_case('tensor=1') == Case()
    assert Case().name == 'one process' and Case().world_size == 1


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('tensr=2', "'tensr=2' is not understood. Did you mean 'tensor'"),
        ('tensor', "'tensor' is not understood"),
        ('tensor=x', "tensor='x' must be a positive"),
        ('tensor=0', "tensor='0' must be a positive"),
        ('pipeline=2,layers=3/x', "layers='x' must be a positive"),
        ('reshard=layers', "reshard='layers'. Did you mean 'layer'"),
        ('offload=yes', 'must be True or False'),
    ],
)
def test_what_is_not_understood(text: str, message: str) -> None:
    with pytest.raises(ValueError, match='--layouts') as error:
        parse_case(text)
    assert message in str(error.value)


def test_options_of_a_strategy() -> None:
    own = {'type': 'S', 'reshard': 'layer', 'pipeline': {'layers': [1, 2]}, 'parallel': {}}
    assert Case().options(own) == {
        'type': 'S',
        'reshard': 'layer',
        'parallel': {'data_shard': 1, 'data_replicate': 1},
    }
    case = parse_case('pipeline=2,tensor=2,schedule=gpipe,layers=3/5,reshard=never,offload=True')
    assert case.options(own) == {
        'type': 'S',
        'reshard': 'never',
        'offload': True,
        'parallel': {'data_shard': 1, 'data_replicate': 1, 'pipeline': 2, 'tensor': 2},
        'pipeline': {'schedule': 'gpipe', 'layers': [3, 5]},
    }


def test_sizes() -> None:
    case = parse_case('pipeline=2,data_replicate=3,data_shard=2,schedule=zbv_zero_bubble')
    assert (case.world_size, case.data, case.stages) == (12, 6, 4)
    assert parse_case('pipeline=4').stages == 4
    assert parse_case('schedule=interleaved_1f1b').stages == 1  # no pipeline, no stages
    assert deepest([Case(), case]) == 4
    for schedule, stages in {'1f1b': 2, 'interleaved_1f1b': 4, 'zbv_zero_bubble': 4}.items():
        assert parse_case(f'pipeline=2,schedule={schedule}').stages == stages
    with pytest.raises(ValueError, match=r"'interleaved1f1b' is unknown.*interleaved_1f1b"):
        _ = parse_case('pipeline=2,schedule=interleaved1f1b').stages


def test_defaults_cover_every_axis_and_option() -> None:
    cases = default_cases(4, 'cpu')
    assert cases[0] == Case() and len(set(cases)) == len(cases)
    assert {axis for case in cases for axis, _ in case.degrees} == {
        'pipeline', 'data_replicate', 'data_shard', 'context', 'tensor',
    }  # fmt: skip
    assert {case.reshard for case in cases} == {None, 'layer', 'never'}
    assert len({case.schedule for case in cases}) == 6
    assert max(case.world_size for case in cases) == 4
    assert {case.world_size for case in default_cases(2, 'cpu')} == {1, 2}
    assert default_cases(1, 'cpu') == [Case()]
    rings = [case for case in default_cases(2, 'cuda') if case.context_attention == 'ring']
    assert len(rings) == 1


def test_names_are_told_once() -> None:
    with pytest.raises(ValueError, match="'tensor=2' is there twice"):
        names([parse_case('tensor=2'), parse_case('tensor=2,data_shard=1')])


@pytest.mark.parametrize(
    ('text', 'reason'),
    [
        ('data_shard=2', None),
        ('tensor=2', 'tensor=2 does not divide model.num_heads=3'),
        ('context=2', 'multiple of 4 tokens'),
        ('pipeline=8', '8 stages'),
        ('data_shard=8,tensor=2', 'needs 16 processes, there are 8'),
        ('pipeline=2,layers=1/2', 'layers'),
    ],
)
def test_why_a_layout_cannot_run(text: str, reason: str | None) -> None:
    with torch.device('meta'):
        model = InternLM(
            vocab_size=8, hidden_size=12, intermediate_size=16, num_layers=4, num_heads=3
        )
    found = why_not(parse_case(text), model, seq_len=30, micro_batches=16, processes=8)
    assert found is None if reason is None else reason in found


def test_the_ring_is_for_rows_of_one_document() -> None:
    with torch.device('meta'):
        model = InternLM(
            vocab_size=8, hidden_size=16, intermediate_size=16, num_layers=2, num_heads=2
        )
    rings = [parse_case('context=2,context_attention=ring'), parse_case('context=2')]
    for packed, expected in ((False, [False, False]), (True, [True, False])):
        found = [why_not(case, model, 32, 4, 2, packed) for case in rings]
        assert [reason is not None and 'packed' in reason for reason in found] == expected
