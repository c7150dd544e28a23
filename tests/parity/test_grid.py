"""Every layout on up to four processes trains, and resumes others' checkpoints, as one does.

One run of the tool over the tiny config; the tests below are its cells.
"""

import json
from pathlib import Path

import pytest

from internlm_mm.verify.cli import main
from internlm_mm.verify.layouts import default_cases
from tests.helpers import TINY

PRECISIONS = ('float64', 'float32', 'bfloat16')
LIMITS = {'float64': 1e-9, 'float32': 1e-5, 'bfloat16': 0.25}  # of what is seen: 0.1
LAYOUTS = [case.name for case in default_cases(4, 'cpu')]

pytestmark = pytest.mark.parallel


@pytest.fixture(scope='module')
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[dict]]:
    """All cells by precision and layout."""
    path = tmp_path_factory.mktemp('grid') / 'cells.json'
    # Four heads, so that nothing has to be left out.
    options = ['--cfg-options', 'model.num_heads=4', 'model.intermediate_size=48']
    arguments = [str(TINY), '--precision', ','.join(PRECISIONS), '--json', str(path)]
    code = main([*arguments, '--processes', '4', '--device', 'cpu', *options])
    reports = json.loads(path.read_text())['reports']
    assert code == (not all(report['passed'] for report in reports))
    assert not any(report['skipped'] or report['errors'] for report in reports)
    found: dict[tuple[str, str], list[dict]] = {}
    for report in reports:
        for cell in report['cells']:
            found.setdefault((report['precision'], cell['layout']), []).append(cell)
    return found


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('precision', PRECISIONS)
def test_layout(cells, precision: str, layout: str) -> None:
    row = {cell['check']: cell for cell in cells[precision, layout]}
    before = LAYOUTS[LAYOUTS.index(layout) - 1]
    assert set(row) == {
        'initial', 'loss', 'norm', 'gradients', 'weights', 'same resume', f'resume from {before}',
    }  # fmt: skip
    assert [cell for cell in row.values() if not cell['passed']] == []
    assert max(cell['max_relative_difference'] for cell in row.values()) <= LIMITS[precision]
    assert row['initial']['max_relative_difference'] == 0
    assert row['same resume']['max_relative_difference'] == 0


# The ways a strategy can be set, where they could disagree with a layout.
VARIANTS = {
    'recomputed': ['strategy.recompute=0.5'],
    'written out attention': ['strategy.attention=reference'],
    'offloaded': ['strategy.offload=True'],
    'grouped heads': ['model.type=Llama', 'model.num_heads=4', 'model.num_kv_heads=2'],
    'biases on q, k, v': ['model.type=Qwen2', 'model.num_heads=4', 'model.num_kv_heads=2'],
    'normalised heads': ['model.type=Qwen3', 'model.num_heads=4', 'model.num_kv_heads=2'],
    'tied head': ['model.type=Llama', 'model.num_heads=4', 'model.tie_word_embeddings=True'],
    'dynamic': [
        'model.num_heads=4',
        'model.rope_scaling.rope_type=dynamic',
        'model.rope_scaling.factor=2.0',
        'model.rope_scaling.original_max_position_embeddings=8',
    ],
    'dynamic, all documents short': [
        'model.num_heads=4',
        'model.rope_scaling.rope_type=dynamic',
        'model.rope_scaling.factor=2.0',
    ],
    'adapters': ['model.num_heads=4', 'model.adapter.rank=4', 'model.adapter.dora=True'],
    'one document a row': ['train_dataloader.dataset.document_lengths=None'],
}


# What cannot be: attention that is written out does not know of tokens on other ranks, and a
# pipeline has the two uses of a tied table on different ranks.
REFUSED = {
    'written out attention': ['pipeline=2,context=2'],
    'tied head': ['pipeline=2,context=2', 'pipeline=2,data_shard=2'],
}


@pytest.mark.parametrize('variant', VARIANTS)
def test_variant(tmp_path: Path, variant: str) -> None:
    layouts = ['data_shard=2,tensor=2', 'pipeline=2,context=2', 'pipeline=2,data_shard=2']
    path = tmp_path / 'cells.json'
    arguments = [str(TINY), '--layouts', *layouts, '--precision', 'float64', '--json', str(path)]
    options = ['--cfg-options', *VARIANTS[variant]]
    code = main([*arguments, '--processes', '4', '--device', 'cpu', *options])
    report = json.loads(path.read_text())
    assert [cell for cell in report['cells'] if not cell['passed']] == []
    assert code == 0
    assert [skipped['layout'] for skipped in report['skipped']] == REFUSED.get(variant, [])


def test_uneven_stages(tmp_path: Path) -> None:
    path = tmp_path / 'cells.json'
    layouts = [
        'pipeline=2,schedule=interleaved_1f1b',
        'pipeline=2,layers=3/5',
    ]  # 4 stages, 8 layers
    arguments = [str(TINY), '--layouts', *layouts, '--precision', 'float64', '--json', str(path)]
    assert main([*arguments, '--processes', '2', '--device', 'cpu']) == 0
    report = json.loads(path.read_text())
    assert not report['skipped']
    assert {cell['layout'] for cell in report['cells']} == {'one process', *layouts}


# Ways of setting a strategy that meet only on some layouts.
TOGETHER = [
    'pipeline=2,data_shard=2,reshard=never',
    'pipeline=2,data_shard=2,reshard=never,schedule=zbv_zero_bubble',
    'data_shard=2,tensor=2,reshard=never',
    'context=2,tensor=2,reshard=layer,offload=True',
]


def test_options_that_meet(tmp_path: Path) -> None:
    path = tmp_path / 'cells.json'
    arguments = [str(TINY), '--layouts', *TOGETHER, '--precision', 'float64', '--json', str(path)]
    assert main([*arguments, '--processes', '4', '--device', 'cpu']) == 0
    report = json.loads(path.read_text())
    assert not report['skipped']
    assert {cell['layout'] for cell in report['cells']} == {'one process', *TOGETHER}


def test_half_precision_with_a_loss_scale(tmp_path: Path) -> None:
    path = tmp_path / 'cells.json'
    layouts = ['data_shard=2', 'tensor=2', 'pipeline=2']
    arguments = [str(TINY), '--layouts', *layouts, '--precision', 'float16', '--json', str(path)]
    scale = ['--cfg-options', 'optim_wrapper.loss_scale.initial=1024.']
    assert main([*arguments, '--processes', '2', '--device', 'cpu', *scale]) == 0
    cells = json.loads(path.read_text())['cells']
    assert {cell['layout'] for cell in cells} == {'one process', *layouts}
    # Three more bits than bf16 has; a gradient that kept its scale would be off by a thousand.
    assert max(cell['max_relative_difference'] for cell in cells) < LIMITS['bfloat16']
