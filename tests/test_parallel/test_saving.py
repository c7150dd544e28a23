"""What MMEngine's calls ask of the run's state; test_run_state.py shows that it comes back."""

from pathlib import Path
from unittest import mock

import pytest
from torch import nn

from tests.strategies import strategy


@pytest.fixture
def saving():
    built = strategy()
    built.run_state = mock.Mock()
    built.run_state.load.side_effect = lambda path, content, callback: {'iter': 7}
    return built


@pytest.mark.parametrize(
    ('options', 'content'),
    [
        ({}, {'model', 'random', 'optimizer', 'scheduler'}),
        ({'resume_optimizer': False}, {'model', 'random', 'scheduler'}),
        ({'resume_param_scheduler': False}, {'model', 'random', 'optimizer'}),
    ],
    ids=['everything', 'no optimizer', 'no scheduler'],
)
def test_resuming_takes_what_is_asked_for(saving, options, content):
    callback = mock.Mock()
    assert saving.resume('run/iter_7', callback=callback, **options) == {'iter': 7}
    ((path, asked, given), _) = saving.run_state.load.call_args
    assert (path, set(asked), given) == (Path('run/iter_7'), content, callback)


def test_loading_takes_the_weights_alone(saving):
    assert saving.load_checkpoint('run/iter_7') == {'iter': 7}
    saving.run_state.load.assert_called_once_with(Path('run/iter_7'), ('model',), None)


def test_saving_hands_everything_on(saving):
    extra, callback = {'meta': 1}, mock.Mock()
    saving.save_checkpoint('run/iter_7', extra_ckpt=extra, callback=callback, save_optimizer=False)
    saving.run_state.save.assert_called_once_with(Path('run/iter_7'), False, True, extra, callback)
    saving.save_checkpoint('run/iter_8', save_param_scheduler=False)
    saving.run_state.save.assert_called_with(Path('run/iter_8'), True, False, {}, None)


def test_tensors_by_name(saving):
    saving.model = nn.Linear(2, 2)
    assert saving.model_state_dict().keys() == {'weight', 'bias'}
    saving.run_state.optimizer_tensors.return_value = {'optimizer.weight.exp_avg': 3}
    assert saving.optim_state_dict() == {'optimizer.weight.exp_avg': 3}
