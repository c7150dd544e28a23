"""How far runs lie apart, against what was put between them."""

import json
from pathlib import Path

import numpy as np
import pytest

from internlm_mm.utils.curves import read_run
from internlm_mm.utils.differences import difference_table, measure_difference


def write_run(folder: Path, losses: dict[int, float], key: str = 'loss') -> Path:
    file = folder / '20260101_000000' / 'vis_data' / 'scalars.json'
    file.parent.mkdir(parents=True)
    lines = [json.dumps({'step': step, key: value}) for step, value in losses.items()]
    file.write_text('\n'.join(lines) + '\n')
    return folder


def test_shift_and_noise_are_told_apart(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(scale=0.02, size=400)
    first = {step: 4.0 for step in range(1, 401)}
    second = {step: 4.01 + noise[step - 1] for step in first}
    runs = [
        read_run(write_run(tmp_path / name, losses))
        for name, losses in (('a', first), ('b', second))
    ]
    apart = measure_difference(*runs)
    part = (np.asarray(list(second.values())) - 4)[300:]
    assert (apart.first, apart.last, apart.count, apart.mean) == (301, 400, 100, 4.0)
    assert apart.signed == pytest.approx(part.mean() / 4)
    assert apart.absolute == pytest.approx(np.abs(part).mean() / 4)
    assert apart.scatter == pytest.approx(part.std() / 4)
    smooth = measure_difference(*runs, smooth=50)
    # Averages reach back before the part: the mean of fifty steps, not of fewer at its beginning.
    assert smooth.absolute == pytest.approx(
        np.mean([abs(noise[i - 49 : i + 1].mean() + 0.01) for i in range(300, 400)]) / 4
    )
    assert smooth.scatter < apart.scatter / 4
    back = measure_difference(runs[1], runs[0], last=1)
    assert back.count == 400 and back.signed < 0 < back.absolute


def test_only_common_steps_of_the_last_part_of_the_first_run(tmp_path: Path) -> None:
    trunk = read_run(write_run(tmp_path / 'trunk', {step: 2.0 for step in range(1, 101)}))
    branch = read_run(write_run(tmp_path / 'branch', {step: 3.0 for step in range(90, 200, 2)}))
    apart = measure_difference(trunk, branch, last=0.25)
    assert (apart.first, apart.last, apart.count, apart.signed) == (90, 100, 6, 0.5)
    with pytest.raises(ValueError, match=r"'loss' at no common step after 95"):
        measure_difference(trunk, read_run(write_run(tmp_path / 'early', {95: 1.0})), last=0.05)


def test_a_line_for_every_pair_and_key(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / name, {step: value for step in range(1, 9)})
        for name, value in (('a', 1.0), ('b', 1.5), ('c', 0.5))
    ]
    header, *lines = difference_table(paths, ['loss']).splitlines()
    assert header.split()[:4] == ['first', 'second', 'of', 'steps']
    assert [line.split()[:2] for line in lines] == [['a', 'b'], ['a', 'c'], ['b', 'c']]
    assert lines[0].split()[-4:] == ['1.0000', '+50.000%', '50.000%', '0.000%']
    assert '7 to 8: 2' in lines[0]


def test_wrong_input(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / 'a', {1: 1.0, 2: 1.0}))
    with pytest.raises(ValueError, match='last=0 must be a share'):
        measure_difference(run, run, last=0)
    with pytest.raises(ValueError, match='smooth=0 must be at least 1'):
        measure_difference(run, run, smooth=0)
    with pytest.raises(KeyError, match=r"'los'.*Did you mean 'loss'"):
        measure_difference(run, run, key='los')
    with pytest.raises(ValueError, match='two runs at least'):
        difference_table([run.path], ['loss'])
