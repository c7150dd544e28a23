"""Whether a layout fits: every refusal names both numbers and a layout that is not refused."""

import re
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.pipelining import schedules

from internlm_mm.models import InternLM, Llama
from internlm_mm.parallel.fit import check_layout, fitting_message
from internlm_mm.parallel.mesh import Layout, LayoutError, resolve_layout
from internlm_mm.registry import SCHEDULES

SIZES = dict(
    vocab_size=48, hidden_size=24, intermediate_size=36, num_layers=6, num_heads=6, max_seq_len=64
)
PROPOSAL = re.compile(r'Nearest: parallel=dict\((.*?)\)')


def model(**changes: int) -> InternLM:
    with torch.device('meta'):
        return InternLM(**(SIZES | changes))


def proposed(message: str) -> Layout:
    """The layout that a message names, read back."""
    (text,) = PROPOSAL.findall(message)
    return Layout(**{key: int(value) for key, value in re.findall(r'(\w+)=(\d+)', text)})


FITTING = [
    (Layout(data_shard=7), 64, 1, None),
    (Layout(tensor=6), 60, None, None),
    (Layout(tensor=2, context=4), 64, None, None),
    (Layout(pipeline=6), 64, 6, None),
    (Layout(pipeline=4), 64, 4, None),
    (Layout(pipeline=2), 64, None, {'layers': [1, 5]}),
    (Layout(pipeline=3), 64, 3, {'schedule': 'interleaved_1f1b'}),
    (Layout(pipeline=2), 64, 3, {'schedule': 'interleaved_1f1b'}),
    (Layout(pipeline=2), 64, 5, {'schedule': 'zbv_zero_bubble'}),
    (Layout(pipeline=3, data_replicate=5, data_shard=2, context=2, tensor=3), 60, 3, None),
]


@pytest.mark.parametrize(('layout', 'seq_len', 'micro_batches', 'pipeline'), FITTING, ids=str)
def test_layouts_that_fit(layout, seq_len, micro_batches, pipeline) -> None:
    check_layout(layout, model(), seq_len, micro_batches, pipeline)


REFUSED = [
    # layout, seq_len, micro-batches, strategy.pipeline; words of the message; what is proposed
    (Layout(tensor=4), 64, 1, None, ('tensor=4', 'num_heads=6'), None),
    (Layout(tensor=4), 64, 4, None, ('tensor=4', 'num_heads=6'), Layout(tensor=2, data_shard=2)),
    (Layout(tensor=5), 64, None, None, ('tensor=5', 'num_heads=6'), Layout(data_shard=5)),
    # Three ranks divide all sizes, but not the four processes.
    (Layout(tensor=4), 66, None, None, ('tensor=4', 'heads=6'), Layout(tensor=2, data_shard=2)),
    (Layout(tensor=3), 64, None, None, ('tensor=3', '64 tokens'), Layout(data_shard=3)),
    (
        Layout(tensor=2, context=2), 14, None, None,
        ('context=2', 'seq_len=14', 'multiple of 4'), Layout(tensor=2, data_shard=2),
    ),
    (
        Layout(tensor=3, context=2), 16, None, None, ('tensor=3', 'the 8 tokens'), None,
    ),
    (
        Layout(context=4), 60, None, None, ('context=4', '60', 'of 8'),
        Layout(context=2, data_shard=2),
    ),
    (Layout(pipeline=8), 64, None, None, ('pipeline=8', 'has 6'), Layout(pipeline=4, data_shard=2)),
    (
        Layout(pipeline=6), 64, 6, {'schedule': 'interleaved_1f1b'},
        ('pipeline=6', '12 stages', 'has 6'), Layout(pipeline=3, data_shard=2),
    ),
    (
        Layout(pipeline=4), 64, 3, None, ('pipeline=4', '3 micro-batches', 'global_batch_size'),
        None,
    ),
    (
        Layout(pipeline=4, data_shard=2), 64, 3, None, ('pipeline=4', '3 micro-batches'), None,
    ),
    (
        Layout(pipeline=4, data_shard=2), 64, 2, {'schedule': 'gpipe'},
        ('pipeline=4', '2 micro-batches'), None,
    ),
    (
        Layout(pipeline=2), 64, 5, {'schedule': 'interleaved_1f1b'},
        ("'interleaved_1f1b'", '5 micro-batches', '2 ranks', '4 would'), None,
    ),
    (
        Layout(pipeline=2), 64, 5, {'schedule': 'interleaved_zero_bubble', 'stages_per_rank': 1},
        ("'interleaved_zero_bubble'", '5 micro-batches', '2 ranks', '4 would'), None,
    ),
    (
        Layout(pipeline=3), 64, 7, {'schedule': 'interleaved_1f1b'},
        ("'interleaved_1f1b'", '7 micro-batches', '3 ranks', '6 would'), None,
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ('layout', 'seq_len', 'micro_batches', 'pipeline', 'words', 'nearest'), REFUSED, ids=str
)
def test_refusals_name_both_numbers(
    layout, seq_len, micro_batches, pipeline, words, nearest
) -> None:
    with pytest.raises(ValueError) as caught:
        check_layout(layout, model(), seq_len, micro_batches, pipeline)
    message = str(caught.value)
    for word in words:
        assert word in message
    if nearest is not None:
        assert proposed(message) == nearest


def test_a_schedule_from_outside_that_goes_in_rounds() -> None:
    name = 'rounds_of_test_fit'

    class Rounds(schedules.ScheduleInterleaved1F1B):
        """Torch's, under a name of its own."""

    SCHEDULES.register_module(name=name, module=Rounds)
    try:
        with pytest.raises(ValueError, match=r'5 micro-batches .* 4 would'):
            check_layout(Layout(pipeline=2), model(), 64, 5, {'schedule': name})
    finally:
        SCHEDULES.module_dict.pop(name)


@pytest.mark.parametrize(
    ('pipeline', 'message'),
    [
        ({'schedule': '1f1'}, r"schedule='1f1' is unknown.*'1f1b'"),
        ({'stages': 2}, r'pipeline\.stages=2 is unknown'),
        ({'layers': [1, 2]}, r'layers=\[1, 2\]: expected 2 stages .* 6 in all, as in \[3, 3\]'),
        ({'stages_per_rank': 2}, "stages_per_rank=2: '1f1b' takes 1"),
    ],
)
def test_options_that_no_layout_would_mend(pipeline, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_layout(Layout(pipeline=2), model(), 64, 4, pipeline)
    assert 'Nearest: parallel' not in str(caught.value)


def test_a_model_that_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match=r'Linear has no nn\.ModuleDict `layers`'):
        check_layout(Layout(pipeline=2), nn.Linear(2, 2), 64)


def test_sizes_that_a_model_does_not_tell_are_not_compared() -> None:
    check_layout(Layout(tensor=4), nn.Linear(3, 3), 64)
    with pytest.raises(ValueError, match='the 62 tokens'):
        check_layout(Layout(tensor=4), nn.Linear(3, 3), 62)


def test_the_proposal_keeps_shards_inside_a_machine() -> None:
    with pytest.raises(ValueError) as caught:
        check_layout(Layout(tensor=4, data_shard=4), model(), 64, None, None, local_size=4)
    assert proposed(str(caught.value)) == Layout(tensor=2, data_shard=2, data_replicate=4)


COUNTED = [
    # parallel, ranks, machine, tokens, micro-batches; what is proposed
    ({'tensor': 4}, 15, 15, 60, None, Layout(tensor=3, data_shard=5)),  # 3 divides 6 heads,
    ({'tensor': 5}, 8, 8, 64, None, Layout(tensor=2, data_shard=4)),  # 4 does not
    ({'tensor': 5}, 8, 8, 61, None, Layout(data_shard=8)),  # nor do two share 61 tokens
    ({'pipeline': 7}, 8, 4, 64, 4, Layout(pipeline=4, data_shard=2)),
    ({'context': 3}, 8, 8, 62, None, Layout(data_shard=8)),
    ({'data_shard': 3}, 8, 8, 64, None, Layout(data_shard=2, data_replicate=4)),
    (
        {'data_shard': 3, 'tensor': 5},
        8,
        8,
        64,
        None,
        Layout(data_shard=2, data_replicate=2, tensor=2),
    ),
]


@pytest.mark.parametrize(
    ('parallel', 'ranks', 'machine', 'seq_len', 'micro', 'nearest'), COUNTED, ids=str
)
def test_a_wrong_number_of_ranks_gets_a_layout_that_fits_all(
    parallel, ranks, machine, seq_len, micro, nearest
) -> None:
    with pytest.raises(LayoutError) as caught:
        resolve_layout(parallel, ranks, machine)
    total = None if micro is None else micro * nearest.data
    message = fitting_message(caught.value, model(), seq_len, total)
    assert message.startswith(caught.value.reason) and f'there are {ranks}.' in message
    assert proposed(message) == nearest
    check_layout(nearest, model(), seq_len, micro)


SCHEDULE = {
    None: 1,
    '1f1b': 1,
    'interleaved_1f1b': 2,
    'interleaved_zero_bubble': 2,
    'zbv_zero_bubble': 2,
}


def fits(sizes: SimpleNamespace, layout: Layout, micro: float | None, schedule: str | None) -> bool:
    """The rules once more, over plain numbers."""
    stages = layout.pipeline * SCHEDULE[schedule]
    rules = [
        layout.tensor == 1 or all(n % layout.tensor == 0 for n in sizes.split),
        layout.context == 1 or sizes.seq_len % (2 * layout.context) == 0,
        sizes.seq_len // layout.context % layout.tensor == 0,
        layout.pipeline == 1 or stages <= sizes.layers,
    ]
    if micro is not None:
        rules += [micro == int(micro) and micro > 0]
        if layout.pipeline > 1:
            rules += [micro >= layout.pipeline]
            if rules[-1] and rules[-2] and (schedule or '').startswith('interleaved'):
                rules += [int(micro) % (int(micro) // layout.pipeline) == 0]
    return all(rules)


@settings(deadline=None)
@given(
    heads=st.integers(1, 12),
    width=st.integers(1, 40),
    vocab=st.integers(1, 40),
    layers=st.integers(1, 9),
    seq_len=st.integers(1, 64),
    micro=st.none() | st.integers(1, 9),
    schedule=st.sampled_from(list(SCHEDULE)),
    degrees=st.fixed_dictionaries(
        {axis: st.integers(1, 4) for axis in ('pipeline', 'data_shard', 'context', 'tensor')}
    ),
)
def test_what_is_proposed_fits(
    heads, width, vocab, layers, seq_len, micro, schedule, degrees
) -> None:
    """Either a layout passes, or the one that is named passes, or there is none with less."""
    stand_in = nn.Module()
    stand_in.layers = nn.ModuleDict({str(index): nn.Identity() for index in range(layers)})
    stand_in.num_heads = stand_in.num_kv_heads = heads
    stand_in.intermediate_size, stand_in.vocab_size = width, vocab
    sizes = SimpleNamespace(split=(heads, width, vocab), layers=layers, seq_len=seq_len)
    layout = Layout(**degrees)
    options = None if schedule is None else {'schedule': schedule}

    def per_rank(other: Layout) -> float | None:
        return None if micro is None else micro * layout.data / other.data

    try:
        check_layout(layout, stand_in, seq_len, micro, options)
    except ValueError as error:
        message = str(error)
    else:
        assert fits(sizes, layout, micro, schedule)
        return
    assert not fits(sizes, layout, micro, schedule)
    smaller = [
        Layout(pipeline=p, context=c, tensor=t, data_shard=layout.world_size // (p * c * t))
        for p, c, t in product(
            *(range(1, degrees[axis] + 1) for axis in ('pipeline', 'context', 'tensor'))
        )
        if layout.world_size % (p * c * t) == 0
    ]
    possible = [other for other in smaller if fits(sizes, other, per_rank(other), schedule)]
    if not possible:  # then one that would with a batch that is shared evenly, if there is one
        floored = [(o, None if micro is None else max(1, int(per_rank(o)))) for o in smaller]
        if not any(fits(sizes, other, count, schedule) for other, count in floored):
            assert f'No layout of {layout.world_size} processes fits' in message
            return
        nearest = proposed(message)
        assert 'with whole micro-batches (train_cfg)' in message
        count = None if micro is None else max(1, int(per_rank(nearest)))
        assert fits(sizes, nearest, count, schedule)
        return
    nearest = proposed(message)
    assert nearest.world_size == layout.world_size
    assert fits(sizes, nearest, per_rank(nearest), schedule)
    count = per_rank(nearest)
    check_layout(nearest, stand_in, seq_len, None if count is None else int(count), options)


def test_a_tied_head_and_pipelines() -> None:
    with torch.device('meta'):
        tied = Llama(**SIZES, tie_word_embeddings=True)
    message = (
        r'strategy\.parallel\.pipeline=2: model\.tie_word_embeddings=True has one table at both '
        r'ends of the model, which a pipeline cuts apart\. Nearest: parallel=dict\('
    )
    with pytest.raises(ValueError, match=message) as caught:
        check_layout(Layout(pipeline=2, tensor=2, data_shard=2), tied, 64, 4)
    nearest = proposed(str(caught.value))
    assert (nearest.pipeline, nearest.tensor, nearest.world_size) == (1, 2, 8)
    check_layout(nearest, tied, 64, 4)
    check_layout(Layout(tensor=2, context=2, data_shard=2), tied, 64, 4)
