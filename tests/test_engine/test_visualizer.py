"""Curves go to any backend that a config names."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from internlm_mm.utils.config import check_config
from tests.helpers import tiny_config, tiny_runner


def test_tensorboard_holds_the_loss(tmp_path: Path) -> None:
    backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
    hooks = [dict(type='EvaluationHook')]
    runner = tiny_runner(tmp_path, visualizer__vis_backends=backends, custom_hooks=hooks)
    runner.train()
    runner.visualizer.close()
    (events,) = tmp_path.glob('*/vis_data/events.out.tfevents.*')
    read = EventAccumulator(str(events.parent))
    read.Reload()
    assert {'loss', 'lr', 'grad_norm', 'val/loss'} <= set(read.Tags()['scalars'])
    losses = read.Scalars('loss')
    assert [event.step for event in losses] == [1, 2, 4, 6]
    assert all(3 < event.value < 5 for event in losses)


@pytest.mark.parametrize('name', ['WandbVisBackend', 'MLflowVisBackend', 'ClearMLVisBackend'])
def test_other_backends_are_known_by_name(name: str, tmp_path: Path) -> None:
    check_config(tiny_config(tmp_path, visualizer__vis_backends=[dict(type=name)]))


def test_weights_and_biases_offline(tmp_path: Path) -> None:
    pytest.importorskip('wandb')
    backend = dict(type='WandbVisBackend', init_kwargs=dict(mode='offline', project='tiny'))
    runner = tiny_runner(tmp_path, visualizer__vis_backends=[backend])
    runner.train()
    runner.visualizer.close()
    assert list(tmp_path.glob('*/vis_data/wandb/offline-run-*'))


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('mlflow')
    monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')  # files need no database driver
    backend = dict(type='MLflowVisBackend', tracking_uri=(tmp_path / 'mlruns').as_uri())
    runner = tiny_runner(tmp_path, visualizer__vis_backends=[backend])
    runner.train()
    runner.visualizer.close()
    assert list(tmp_path.glob('mlruns/*/*/metrics/loss'))


@pytest.mark.skipif(find_spec('wandb') is not None, reason='wandb is installed')
def test_a_backend_that_is_not_installed(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match='pip install wandb'):
        tiny_runner(tmp_path, visualizer__vis_backends=[dict(type='WandbVisBackend')]).train()
