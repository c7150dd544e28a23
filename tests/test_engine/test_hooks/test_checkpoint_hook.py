"""When checkpoints are written, and that no old one is lost."""

import json
from pathlib import Path

import pytest

from internlm_mm.checkpoint.step_folders import verify
from internlm_mm.engine.hooks import StepCheckpointHook
from tests.helpers import tiny_runner


def names(work_dir: Path) -> list[str]:
    return sorted(path.name for path in work_dir.glob('iter_*'))


def hook(**options) -> dict:
    return dict(type='StepCheckpointHook', **options)


@pytest.mark.parametrize('async_save', [True, False])
def test_on_the_interval_and_at_the_end(async_save: bool, tmp_path: Path) -> None:
    config = hook(interval=2, keep_last=2, async_save=async_save)
    tiny_runner(tmp_path, default_hooks__checkpoint=config, train_cfg__max_iters=5).train()
    assert names(tmp_path) == ['iter_4', 'iter_5']
    for name in names(tmp_path):
        assert verify(tmp_path / name) == []
        assert json.loads((tmp_path / name / 'state.json').read_text())['train_loop'][
            'iter'
        ] == int(name[5:])


def test_without_an_interval_only_the_end(tmp_path: Path) -> None:
    tiny_runner(tmp_path, default_hooks__checkpoint=hook()).train()
    assert names(tmp_path) == ['iter_6']


def test_the_end_is_saved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = tiny_runner(tmp_path, default_hooks__checkpoint=hook(interval=3))
    saved, save = [], runner.save_checkpoint

    def watch(out_dir: str, filename: str, **options) -> None:
        saved.append(filename)
        save(out_dir, filename, **options)

    monkeypatch.setattr(runner, 'save_checkpoint', watch)
    runner.train()
    assert saved == ['iter_3', 'iter_6']


def test_a_finished_run_that_resumes_writes_nothing(tmp_path: Path) -> None:
    tiny_runner(tmp_path, default_hooks__checkpoint=hook()).train()
    before = (tmp_path / 'iter_6' / 'manifest.json').stat().st_mtime_ns
    tiny_runner(tmp_path, default_hooks__checkpoint=hook(), resume=True).train()
    assert (tmp_path / 'iter_6' / 'manifest.json').stat().st_mtime_ns == before


def test_a_failing_save_costs_no_older_checkpoint(tmp_path: Path, monkeypatch) -> None:
    config = hook(interval=2, keep_last=1, async_save=False)
    runner = tiny_runner(tmp_path, default_hooks__checkpoint=config)
    save = runner.save_checkpoint

    def fail(out_dir: str, filename: str, **options) -> None:
        if filename == 'iter_4':
            raise OSError('disk full')
        save(out_dir, filename, **options)

    monkeypatch.setattr(runner, 'save_checkpoint', fail)
    with pytest.raises(OSError, match='disk full'):
        runner.train()
    assert names(tmp_path) == ['iter_2']
    assert verify(tmp_path / 'iter_2') == []


def test_an_early_end_is_saved(tmp_path: Path) -> None:
    stop = dict(type='mmengine.hooks.EarlyStoppingHook', monitor='loss', stopping_threshold=1e9)
    hooks = [dict(type='EvaluationHook', interval=2, at_end=False), stop]
    config = hook(interval=100)
    tiny_runner(tmp_path, default_hooks__checkpoint=config, custom_hooks=hooks).train()
    assert names(tmp_path) == ['iter_2']


def test_weights_alone_do_not_resume(tmp_path: Path) -> None:
    config = hook(save_optimizer=False)
    tiny_runner(tmp_path, default_hooks__checkpoint=config, train_cfg__max_iters=2).train()
    index = (tmp_path / 'iter_2' / 'metadata.json').read_text()
    assert 'model.norm.weight' in index and 'optimizer.' not in index
    with pytest.raises(ValueError, match='saved without optimizer state; use load_from'):
        tiny_runner(tmp_path, resume=True).train()


@pytest.mark.parametrize('option', ['interval', 'keep_last'])
def test_wrong_options(option: str) -> None:
    with pytest.raises(ValueError, match=f'StepCheckpointHook: {option}=0'):
        StepCheckpointHook(**{option: 0})
