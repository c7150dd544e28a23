"""A start that fails leaves a work dir as it was."""

from itertools import count

import pytest

from internlm_mm.engine.made_folders import MadeFolders
from internlm_mm.engine.train_cli import main
from tests.helpers import TINY

NUMBERS = count()


def test_what_was_made_goes(tmp_path):
    made = MadeFolders(tmp_path / 'a' / 'b')
    (tmp_path / 'a' / 'b' / 'log' / 'deep').mkdir(parents=True)
    (tmp_path / 'a' / 'b' / 'log' / 'deep' / 'x').touch()
    made.take_back(tmp_path / 'a' / 'b' / 'log')
    assert list(tmp_path.iterdir()) == []
    made.take_back(None)  # nothing to do


def test_what_was_there_stays(tmp_path):
    (tmp_path / 'work' / 'log').mkdir(parents=True)
    made = MadeFolders(tmp_path / 'work')
    (tmp_path / 'work' / 'new').mkdir()
    made.take_back(tmp_path / 'work' / 'log')
    assert {path.name for path in (tmp_path / 'work').iterdir()} == {'log', 'new'}
    made.take_back(tmp_path / 'work' / 'new')
    assert [path.name for path in (tmp_path / 'work').iterdir()] == ['log']


def test_what_came_from_elsewhere_stays(tmp_path):
    made = MadeFolders(tmp_path / 'a' / 'b')
    (tmp_path / 'a' / 'b' / 'log').mkdir(parents=True)
    (tmp_path / 'a' / 'other').touch()
    made.take_back(tmp_path / 'a' / 'b' / 'log')
    assert [path.name for path in (tmp_path / 'a').iterdir()] == ['other']


@pytest.mark.parametrize(
    'option',
    [
        'strategy.parallel.data_shard=3',  # when the process is set up
        'model.num_heads=3',  # when the model is built
        'strategy.recompute=2',  # when it is placed
        'load_from=nowhere',
    ],
)
def test_a_mistake_leaves_nothing(tmp_path, option, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [option, f'experiment_name=made_{next(NUMBERS)}']
    assert main([str(TINY), '--work-dir', 'runs/one', '--cfg-options', *options]) == 2
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_middle_leaves_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(
        'internlm_mm.engine.loops.TokenTrainLoop.run', lambda self: int('a value', base=10)
    )
    options = [f'experiment_name=made_{next(NUMBERS)}']
    assert main([str(TINY), '--work-dir', str(tmp_path / 'run'), '--cfg-options', *options]) == 1
    assert list((tmp_path / 'run').glob('*/environment.txt'))
