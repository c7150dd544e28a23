"""The whole, over two processes; the grid over four and planted errors are in tests/parity/."""

from pathlib import Path

import pytest

from internlm_mm.utils.config import load_config
from internlm_mm.verify.layouts import parse_case
from internlm_mm.verify.verification import Verification, default_processes
from tests.helpers import TINY

LAYOUTS = ['data_shard=2', 'pipeline=2,schedule=interleaved_1f1b']  # the grid has the others


@pytest.mark.filterwarnings('ignore:torch.distributed is disabled:UserWarning')
def test_layouts_of_two_processes(tmp_path: Path) -> None:
    cases = [parse_case(text) for text in [*LAYOUTS, 'data_shard=3', 'pipeline=2,layers=1/1']]
    verification = Verification(load_config(TINY), cases, ['float64'], tmp_path, processes=2)
    lines: list[str] = []
    (report,) = verification.run(lines.append)
    assert list(report.skipped) == ['data_shard=3', 'pipeline=2,layers=1/1']
    assert report.passed and not report.errors
    ring = ['one process', *LAYOUTS]
    assert {(cell.layout, cell.check) for cell in report.cells} == {
        (layout, check)
        for layout, before in zip(ring, [ring[-1], *ring[:-1]], strict=True)
        for check in (
            'initial', 'loss', 'norm', 'gradients', 'weights', 'same resume',
            f'resume from {before}',
        )
    }  # fmt: skip
    assert max(cell.max_relative_difference for cell in report.cells) < 1e-9
    # Each layout's beginning and what became of it, and the checkpoints of those that come later.
    assert len(lines) == 2 * len(ring) + 1
    assert lines[1] == '    6 checks passed' and lines[3] == '    7 checks passed'


def test_all_pairs(tmp_path: Path) -> None:
    cases = [parse_case('data_replicate=2')]
    config = load_config(TINY)
    verification = Verification(config, cases, ['float64'], tmp_path, processes=2, pairs='all')
    (report,) = verification.run(print)
    resumes = {(c.layout, c.check) for c in report.cells if c.check.startswith('resume from')}
    assert resumes == {
        ('one process', 'resume from data_replicate=2'),
        ('data_replicate=2', 'resume from one process'),
    }
    assert report.passed


def test_what_one_process_cannot_train(tmp_path: Path) -> None:
    config = load_config(TINY, {'strategy.precision.param': 'float16'})  # and no loss scale
    verification = Verification(config, [], ['float16'], tmp_path)
    with pytest.raises(ValueError, match=r'one process: .*loss_scale'):
        verification.run(print)


def test_default_processes() -> None:
    assert default_processes('cpu') == 4
