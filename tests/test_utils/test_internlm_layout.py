"""`internlm_mm/utils/internlm_layout.py`: the arithmetic, against the original's documented rules.

The oracle is written here from the documentation: data ranks are GPUs / (tensor x pipeline); zero1
below 1 spreads optimizer state over all of them, 1 over none, k over k consecutive ones.
"""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from internlm_mm.datasets import BatchSizeRampup
from internlm_mm.datasets.sampler import check_division
from internlm_mm.parallel.mesh import resolve_layout
from internlm_mm.utils.config_draft import Draft
from internlm_mm.utils.internlm_layout import (
    parse_skip_batches,
    read_batches,
    read_degrees,
)
from internlm_mm.utils.internlm_reader import InternLMConfig

DEGREES = st.sampled_from([1, 2, 4])


def draft(**sections: Any) -> Draft:
    return Draft(InternLMConfig(Path('run.py'), sections))


@st.composite
def jobs(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """tensor, pipeline, data ranks, and a zero1 that divides them or is below 1."""
    data = draw(st.sampled_from([1, 2, 4, 6, 8, 16]))
    divisors = [k for k in range(-1, data + 1) if k < 1 or data % k == 0]
    return draw(DEGREES), draw(DEGREES), data, draw(st.sampled_from(divisors))


@given(job=jobs(), as_dicts=st.booleans(), local=st.sampled_from([1, 4, 8]))
def test_zero1_is_shards_and_copies(
    job: tuple[int, int, int, int], as_dicts: bool, local: int
) -> None:
    tensor, pipeline, data, zero1 = job
    gpus = tensor * pipeline * data
    forms = dict(tensor=tensor, pipeline=pipeline, zero1=zero1)
    if as_dicts:
        forms = {key: dict(size=size) for key, size in forms.items()}  # type: ignore[misc]
    made = read_degrees(draft(parallel=forms), gpus)
    assert made.data_ranks == data
    layout = resolve_layout(made.parallel, gpus, local)
    assert (layout.tensor, layout.pipeline, layout.data) == (tensor, pipeline, data)
    assert layout.data_shard == (data if zero1 <= 0 else zero1)

    # InternEvo numbers ranks as pipeline x data x tensor; ranks that share an optimizer state are
    # those of one pipeline stage and tensor place whose data ranks lie in one block of zero1.
    def shares(rank: int) -> tuple[int, int, int]:
        stage, rest = divmod(rank, data * tensor)
        data_rank, place = divmod(rest, tensor)
        return stage, place, data_rank // (data if zero1 <= 0 else zero1)

    def ours(rank: int) -> tuple[int, int, int]:
        at = layout.coordinate(rank)
        return at['pipeline'], at['tensor'], at['data_replicate']

    assert [shares(rank) for rank in range(gpus)] == [ours(rank) for rank in range(gpus)]
    # Without the number of GPUs the same config fits every job of that shape.
    open_ended = read_degrees(draft(parallel=forms), None)
    assert resolve_layout(open_ended.parallel, gpus, local) == layout


@given(
    job=jobs(),
    micro_num=st.integers(4, 16),
    micro_bsz=st.integers(1, 4),
    rampup=st.tuples(st.integers(1, 20), st.integers(1, 5), st.integers(1, 5)),
)
def test_a_step_has_the_rows_it_had(
    job: tuple[int, int, int, int],
    micro_num: int,
    micro_bsz: int,
    rampup: tuple[int, int, int],
) -> None:
    tensor, _, data, zero1 = job
    source = draft(
        parallel=dict(tensor=tensor, pipeline=1, zero1=zero1),
        data=dict(
            micro_num=micro_num,
            micro_bsz=micro_bsz,
            rampup_batch_size=' '.join(map(str, rampup)),
        ),
    )
    made = read_degrees(source, tensor * data)
    batches = read_batches(source, made)
    assert batches.micro_batch_size == micro_bsz
    rows = micro_num * micro_bsz * data
    check_division(rows, batches.micro_batch_size, data)  # raises if it does not cut
    start, increment, every = rampup
    if start >= micro_num:
        assert batches.rampup is None
        return
    unit = micro_bsz * data
    ours = BatchSizeRampup(start * unit, increment * unit, every)
    assert batches.rampup == rampup
    for stage in ours.stages(rows):
        check_division(stage, batches.micro_batch_size, data)
    for step in range(60):  # what the original's sampler takes at each step
        theirs = min(micro_num, start + increment * (step // every)) * unit
        assert ours.batch_size(step, rows) == theirs


@given(
    pipeline=st.sampled_from([2, 3, 4, 8]),
    micro_num=st.integers(1, 16),
    micro_bsz=st.integers(1, 6),
    chunks=st.sampled_from([1, 2]),
)
def test_a_pipeline_gets_enough_micro_batches_of_the_same_rows(
    pipeline: int, micro_num: int, micro_bsz: int, chunks: int
) -> None:
    assume(chunks == 1 or micro_num % pipeline == 0)  # the original asserts it
    source = draft(
        parallel=dict(pipeline=dict(size=pipeline, interleaved_overlap=True)),
        model=dict(num_chunks=chunks),
        data=dict(micro_num=micro_num, micro_bsz=micro_bsz),
    )
    made = read_degrees(source, pipeline)
    if micro_num * micro_bsz < pipeline:
        with pytest.raises(ValueError, match=r'raise data.micro_num'):
            read_batches(source, made)
        return
    micro = read_batches(source, made).micro_batch_size
    count, rest = divmod(micro_num * micro_bsz, micro)
    assert rest == 0 and count >= pipeline and micro <= micro_bsz
    if micro_num >= pipeline:
        assert micro == micro_bsz
    expected = {} if chunks == 1 else dict(schedule='interleaved_1f1b', stages_per_rank=2)
    assert made.schedule == expected


@pytest.mark.parametrize(
    ('parallel', 'gpus', 'expected'),
    [
        # weights over 4, optimizer state over all: InternEvo's demonstration of ISP
        (dict(zero1=dict(size=-1), tensor=dict(size=2, mode='isp'), weight=dict(size=4)), 8,
         dict(context=2, data_shard=-1)),
        # weights over 2, state over 2 x 4 ranks, which are 4 data ranks of 2 context ranks
        (dict(zero1=dict(size=4), tensor=dict(size=2, mode='isp'), weight=dict(size=2)), 16,
         dict(context=2, data_shard=4, data_replicate=-1)),
        (dict(zero1=dict(size=4), tensor=dict(size=1, mode='isp'), weight=dict(size=2)), 16,
         dict(data_shard=8, data_replicate=-1)),
    ],
)  # fmt: skip
def test_isp_is_context_parallel(
    parallel: dict[str, Any], gpus: int, expected: dict[str, int]
) -> None:
    made = read_degrees(draft(parallel=parallel), gpus)
    assert made.parallel == expected
    assert made.reshard == 'layer'  # weights are gathered layer by layer, as ISP does
    layout = resolve_layout(made.parallel, gpus, 8)
    assert layout.data * layout.context == gpus == made.data_ranks * layout.context


def test_isp_that_has_no_equal_is_said() -> None:
    parallel = dict(zero1=1, tensor=dict(size=4, mode='isp'))
    source = draft(parallel=parallel)
    assert read_degrees(source, 8).parallel == dict(context=4, data_shard=1, data_replicate=-1)
    assert source.rows['parallel.zero1'].status == 'changed'


@pytest.mark.parametrize(
    ('sections', 'expected'),
    [
        (dict(hybrid_zero_optimizer=dict(overlap_sync_param=True)), 'never'),
        (dict(hybrid_zero_optimizer=dict(overlap_sync_param=False)), 'step'),
        (dict(parallel=dict(zero1=dict(size=-1, fsdp=True))), 'layer'),
        ({}, 'step'),
    ],
)
def test_how_long_weights_stay_whole(sections: dict[str, Any], expected: str) -> None:
    assert read_degrees(draft(**sections), None).reshard == expected


@pytest.mark.parametrize(
    ('mode', 'schedule'),
    [('1f1b', {}), ('ZBH1', {}), ('zbv', {'schedule': 'zbv_zero_bubble'})],
)
def test_pipeline_modes(mode: str, schedule: dict[str, str]) -> None:
    made = read_degrees(draft(parallel=dict(pipeline=dict(size=2, mode=mode))), None)
    assert made.schedule == schedule


@pytest.mark.parametrize(
    ('parallel', 'gpus', 'message'),
    [
        (dict(tensor=2, pipeline=2), 6, r'--gpus 6: run.py needs a multiple of 4 \(tensor 2 x'),
        (dict(zero1=8), 12, '--gpus 12: parallel.zero1=8 does not divide the 12 data ranks'),
        (dict(zero1=8), 0, '--gpus 0'),
        (dict(tensor='8'), 8, "parallel.tensor='8': expected int"),
        (dict(tensor=True), 8, 'parallel.tensor=True: expected int'),
        (dict(tensor=0), 8, 'parallel.tensor=0 must be at least 1'),
        (dict(pipeline=dict(size=-1)), 8, 'parallel.pipeline.size=-1 must be at least 1'),
        (dict(tensor=dict(size=2, mode='ips')), 8, "'ips' is unknown. Did you mean 'isp'"),
        (dict(pipeline=dict(size=2, mode='zbv1')), 8, "'zbv1' is unknown. Did you mean 'zbv'"),
        (dict(weight=dict(size=2)), 8, 'parallel.weight.size=2 needs parallel.tensor.mode="isp"'),
    ],
)
def test_degrees_that_cannot_be(parallel: dict[str, Any], gpus: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_degrees(draft(parallel=parallel), gpus)


@pytest.mark.parametrize(
    ('data', 'pipeline', 'message'),
    [
        (dict(micro_num=4), 1, 'has no data.micro_bsz'),
        (dict(micro_num=0, micro_bsz=2), 1, 'data.micro_num=0 must be at least 1'),
        (dict(micro_num=4, micro_bsz=2, gradient_accumulation=2), 1, 'must equal'),
        (dict(micro_num=4, micro_bsz=2, rampup_batch_size='1 2'), 1, 'START INCREMENT EVERY'),
        (dict(micro_num=4, micro_bsz=2, rampup_batch_size='1 0 2'), 1, 'at least 1'),
        (dict(micro_num=4, micro_bsz=2, rampup_batch_size='1 1 2'), 2, 'fewer micro-batches'),
    ],
)
def test_batches_that_cannot_be(data: dict[str, Any], pipeline: int, message: str) -> None:
    source = draft(data=data, parallel=dict(pipeline=pipeline))
    with pytest.raises(ValueError, match=message):
        read_batches(source, read_degrees(source, None))


@given(steps=st.sets(st.integers(0, 40)))
def test_skip_batches_skips_the_same_steps(steps: set[int]) -> None:
    text, ordered = [], sorted(steps)
    while ordered:
        first = last = ordered.pop(0)
        while ordered and ordered[0] == last + 1:
            last = ordered.pop(0)
        text.append(str(first) if first == last else f'{first}-{last}')
    found = parse_skip_batches(draft(data=dict(skip_batches=', '.join(text))))
    assert {step for first, last in found for step in range(first, last + 1)} == steps


@pytest.mark.parametrize('text', ['1-', 'a', '3-1', '1;2', '-1'])
def test_skip_batches_that_cannot_be(text: str) -> None:
    with pytest.raises(ValueError, match=r'data.skip_batches'):
        parse_skip_batches(draft(data=dict(skip_batches=text)))
