"""Runs read back from their logs, summed up and drawn."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_mm.utils.curves import draw_curves, moving_average, read_run, summary_table


def write_start(work_dir: Path, time: str, records: list[dict], torn: str = '') -> Path:
    file = work_dir / time / 'vis_data' / 'scalars.json'
    file.parent.mkdir(parents=True)
    file.write_text('\n'.join(json.dumps(record) for record in records) + '\n' + torn)
    return file


def steps(first: int, last: int, **values: float) -> list[dict]:
    return [{'step': step, 'loss': 10.0 - step, **values} for step in range(first, last + 1)]


def test_a_resumed_run_is_one_and_the_later_start_wins(tmp_path: Path) -> None:
    write_start(tmp_path, '20260101_000000', steps(1, 7, lr=1.0))
    write_start(tmp_path, '20260102_000000', steps(5, 6, lr=2.0))
    run = read_run(tmp_path)
    assert list(run.series('loss')) == [1, 2, 3, 4, 5, 6]  # 7 belongs to what was done again
    assert list(run.series('lr').values()) == [1, 1, 1, 1, 2, 2]
    assert read_run(tmp_path / '20260101_000000').series('loss')[7] == 3


def test_a_start_that_logged_nothing_replaces_nothing(tmp_path: Path) -> None:
    write_start(tmp_path, '20260101_000000', steps(1, 3))
    write_start(tmp_path, '20260102_000000', [])
    assert list(read_run(tmp_path).series('loss')) == [1, 2, 3]


def test_a_line_cut_by_a_kill_is_left_out(tmp_path: Path) -> None:
    write_start(tmp_path, '20260101_000000', steps(1, 3), torn='{"step": 4, "lo')
    assert list(read_run(tmp_path).series('loss')) == [1, 2, 3]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    file = write_start(tmp_path, '20260101_000000', steps(1, 3))
    file.write_text(file.read_text().replace('{"step": 2', '{"stop": 2'))
    with pytest.raises(ValueError, match=r'scalars\.json, line 2: not a record of scalars'):
        read_run(tmp_path)


def test_a_name_nothing_was_logged_under(tmp_path: Path) -> None:
    write_start(tmp_path, '20260101_000000', steps(1, 3, grad_norm=1.0))
    with pytest.raises(KeyError, match=r"has logged no 'grad_nrom'\. Did you mean 'grad_norm'"):
        read_run(tmp_path).series('grad_nrom')
    with pytest.raises(KeyError, match='Did you mean'):
        draw_curves([tmp_path], ['los'], tmp_path / 'x.png')
    with pytest.raises(FileNotFoundError, match='no run has logged here'):
        read_run(tmp_path / 'nowhere')


def test_seconds_and_speed_by_hand(tmp_path: Path) -> None:
    # 100 tokens a step; the first record has no speed, the others cover what lies between.
    write_start(
        tmp_path,
        '20260101_000000',
        [
            {'step': 1, 'consumed_tokens': 100},
            {'step': 5, 'consumed_tokens': 500, 'tokens_per_second': 50},
            {'step': 9, 'consumed_tokens': 900, 'tokens_per_second': 200},
            {'step': 7, 'val/loss': 1.0},
        ],
    )
    run = read_run(tmp_path)
    assert run.seconds() == {0: 0, 5: 10, 9: 12}
    assert run.mean_speed() == 900 / 12
    assert run.positions([5, 7, 9], 'time').tolist() == [10, 11, 12]
    assert run.positions([7], 'tokens').tolist() == [700]
    assert run.positions([7], 'iter').tolist() == [7]
    with pytest.raises(ValueError, match=r"x='token' is no axis\. Did you mean 'tokens'"):
        run.positions([7], 'token')


def test_an_axis_that_was_not_logged(tmp_path: Path) -> None:
    write_start(tmp_path, '20260101_000000', steps(1, 3))
    with pytest.raises(ValueError, match='cannot be drawn over time: it has not logged'):
        draw_curves([tmp_path], ['loss'], tmp_path / 'x.png', x='time')
    assert math.isnan(read_run(tmp_path).mean_speed())


def test_the_table(tmp_path: Path) -> None:
    one, other = tmp_path / 'one', tmp_path / 'other'
    speed = dict(tokens_per_second=2_000.0, consumed_tokens=1_000_000.0)
    write_start(one, '20260101_000000', steps(1, 4, lr=0.1, **speed) + [{'step': 5, 'loss': 8.0}])
    write_start(other, '20260101_000000', [{'step': 2, 'loss': math.nan}])
    header, first, second = summary_table([one, other], ['loss', 'lr']).splitlines()
    cells = [cell.strip() for cell in header.split('  ') if cell.strip()]
    assert cells == ['run', 'steps', 'tokens', 'tokens/s', 'loss last', 'loss best', 'lr last']
    assert first.split() == ['one', '5', '1,000,000', '2,000', '8', '6', 'at', '4', '0.1']
    assert second.split() == ['other', '2', '-', '-', 'nan', '-', '-']


@pytest.mark.parametrize('x', ['iter', 'tokens', 'time'])
def test_a_png_of_two_runs(x: str, tmp_path: Path) -> None:
    for name in ('one', 'two'):
        extra = dict(consumed_tokens=10.0, tokens_per_second=5.0)
        records = [*steps(1, 40, **extra), {'step': 20, 'val/loss': 3.0}]
        write_start(tmp_path / name, '20260101_000000', records)
    out = tmp_path / 'made' / 'curves.png'
    paths = [tmp_path / 'one', tmp_path / 'two']
    assert draw_curves(paths, ['loss', 'val/loss', 'tokens_per_second'], out, x, smooth=5) == out
    assert out.read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
    with pytest.raises(ValueError, match='smooth=0'):
        draw_curves(paths, ['loss'], out, smooth=0)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.integers(1, 40))
def test_moving_average(values: list[float], points: int) -> None:
    expected = [np.mean(values[max(0, i + 1 - points) : i + 1]) for i in range(len(values))]
    assert np.allclose(moving_average(values, points), expected, atol=1e-9)
