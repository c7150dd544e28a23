"""The grid can fail: every planted error makes its cell red and names a parameter."""

from pathlib import Path

import pytest

from internlm_mm.utils.config import load_config
from internlm_mm.verify.layouts import Case, parse_case
from internlm_mm.verify.verification import Report, Verification
from tests.helpers import TINY

pytestmark = pytest.mark.parallel


def verify(
    folder: Path, layout: str, fault: str | None, pairs: str = 'none', **options: object
) -> Report:
    verification = Verification(
        load_config(TINY, options),
        [parse_case(layout)],
        ['float64'],
        folder,
        pairs=pairs,
        prelude=fault and f'tests.parity.faults:{fault}',
    )
    (report,) = verification.run(print)
    return report


# Fault, a layout that it shows on, the first check that is red, where it is first seen.
FAULTS = [
    ('no_reduce_over_shards', 'data_shard=2', 'gradients', 'embed_tokens.weight'),
    ('no_reduce_over_replicas', 'data_replicate=2', 'gradients', 'embed_tokens.weight'),
    ('no_reduce_over_tensor_ranks', 'tensor=2', 'gradients', 'layers.0.input_layernorm.weight'),
    ('no_reduce_over_context_ranks', 'context=2', 'gradients', 'embed_tokens.weight'),
    ('wrong_rotary_offset', 'context=2', 'loss', None),
    ('wrong_rotary_offset', 'context=2', 'gradients', 'embed_tokens.weight'),
    ('mean_of_means', 'data_shard=2', 'gradients', 'embed_tokens.weight'),
    ('averaged_gradients', 'data_replicate=2', 'gradients', 'embed_tokens.weight'),
    ('last_micro_batch_unreduced', 'data_shard=2', 'gradients', 'embed_tokens.weight'),
    ('swapped_stage', 'pipeline=2', 'loss', None),
    ('swapped_stage', 'pipeline=2', 'gradients', 'embed_tokens.weight'),
    ('no_norm_over_stages', 'pipeline=2', 'norm', None),
    ('no_norm_over_stages', 'pipeline=2', 'weights', 'embed_tokens.weight'),
    ('norm_of_a_shard', 'data_shard=2', 'weights', 'embed_tokens.weight'),
    ('norm_counted_twice', 'tensor=2', 'norm', None),
    ('norm_counted_twice', 'tensor=2', 'weights', 'embed_tokens.weight'),
    ('unclipped_shard', 'data_shard=2', 'weights', 'embed_tokens.weight'),
    ('stale_gather', 'data_shard=2,reshard=never', 'loss', None),
    ('stale_gather', 'data_shard=2,reshard=never', 'gradients', 'embed_tokens.weight'),
    ('decay_of_everything', 'data_shard=2', 'weights', 'layers.0.input_layernorm.weight'),
    ('weights_by_rank', 'data_shard=2', 'initial', 'embed_tokens.weight'),
]


@pytest.fixture(scope='module')
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Report]:
    """Each fault once, whatever the number of its rows above."""
    return {
        (fault, layout): verify(tmp_path_factory.mktemp(fault), layout, fault)
        for fault, layout in dict.fromkeys((fault, layout) for fault, layout, *_ in FAULTS)
    }


@pytest.mark.parametrize(('fault', 'layout', 'check', 'parameter'), FAULTS)
def test_fault_is_found(reports, fault: str, layout: str, check: str, parameter) -> None:
    report = reports[fault, layout]
    assert not report.errors, 'it shall train, and wrongly'
    (cell,) = [c for c in report.cells if (c.layout, c.check) == (layout, check)]
    assert not cell.passed
    assert cell.parameter == parameter
    assert cell.max_relative_difference > 1e-5  # the loosest fixed tolerance


# With DoRA over all linear layers.
OF_ADAPTERS = [
    ('no_reduce_of_adapters', 'gradients', 'layers.0.self_attn.q_proj.lora_A.weight'),
    ('lengths_of_parts', 'loss', None),
    (None, None, None),
]


@pytest.mark.parametrize(('fault', 'check', 'parameter'), OF_ADAPTERS)
def test_fault_of_adapters_is_found(tmp_path: Path, fault, check, parameter) -> None:
    adapter = {'model.adapter': {'type': 'LoRA', 'rank': 4, 'dora': True}}
    report = verify(tmp_path, 'tensor=2', fault, **adapter)
    red = [c for c in report.cells if c.layout == 'tensor=2' and not c.passed]
    assert not report.errors
    if fault is None:
        assert not red and report.passed
    else:
        (cell,) = [c for c in red if c.check == check]
        assert cell.parameter == parameter


def test_layouts_without_a_fault_pass(tmp_path: Path) -> None:
    assert verify(tmp_path, 'tensor=2', None).passed


def test_a_resume_that_forgets(tmp_path: Path) -> None:
    report = verify(tmp_path, 'data_shard=2', 'forgotten_moments', pairs='ring')
    red = {(cell.layout, cell.check) for cell in report.cells if not cell.passed}
    one, two = Case().name, 'data_shard=2'
    assert red == {
        (one, 'same resume'), (two, 'same resume'),
        (one, f'resume from {two}'), (two, f'resume from {one}'),
    }  # fmt: skip
    assert {c.parameter for c in report.cells if not c.passed} == {'embed_tokens.weight'}


def test_a_rank_that_fails(tmp_path: Path) -> None:
    report = verify(tmp_path, 'data_shard=2', 'death')
    assert list(report.errors) == ['data_shard=2']
    assert 'rank 1' in report.errors['data_shard=2']
    assert 'FloatingPointError: planted' in report.errors['data_shard=2']
    assert not any(cell.passed for cell in report.cells if cell.layout == 'data_shard=2')
    assert all(cell.passed for cell in report.cells if cell.layout == Case().name)
