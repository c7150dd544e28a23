"""MMEngine's own hooks in our runner: those that work, and those that are refused."""

import json
from pathlib import Path

import pytest
from mmengine.hooks import CheckpointHook, EMAHook

from internlm_mm.engine.stock_hooks import check_hook
from tests.helpers import tiny_runner


def stock(name: str, **options) -> dict:
    return {'type': f'mmengine.hooks.{name}', **options}


def log_of(work_dir: Path) -> str:
    return '\n'.join(path.read_text() for path in work_dir.glob('*/*.log'))


def test_mmengine_logs_with_its_own_hooks_alone(tmp_path: Path) -> None:
    hooks = dict(
        info=stock('RuntimeInfoHook'),
        timer=stock('IterTimerHook'),
        logger=stock('LoggerHook', interval=2),
        param_scheduler=stock('ParamSchedulerHook'),
    )
    runner = tiny_runner(tmp_path, default_hooks=hooks)
    runner.train()
    text = log_of(tmp_path)
    assert 'Iter(train) [2/6]' in text and 'Iter(train) [6/6]' in text
    (file,) = tmp_path.glob('*/vis_data/2*.json')
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line['step'] for line in lines] == [2, 4, 6]
    assert all({'loss', 'grad_norm', 'lr', 'time', 'data_time'} <= line.keys() for line in lines)


def test_logger_reads_what_our_bridge_copies(tmp_path: Path) -> None:
    hooks = [stock('LoggerHook', interval=2), dict(type='EvaluationHook', interval=3)]
    runner = tiny_runner(tmp_path, custom_hooks=hooks, default_hooks__progress=None)
    runner.train()
    text = log_of(tmp_path)
    assert 'tokens_per_second' in text and 'Iter(val) [3/3]' in text


def test_checkpoints_by_the_stock_hook_resume(tmp_path: Path) -> None:
    hook = stock(
        'CheckpointHook', interval=2, by_epoch=False, filename_tmpl='iter_{}', max_keep_ckpts=2
    )
    tiny_runner(tmp_path, default_hooks__checkpoint=hook, train_cfg__max_iters=5).train()
    assert sorted(path.name for path in tmp_path.glob('iter_*')) == ['iter_4', 'iter_5']
    resumed = tiny_runner(tmp_path, default_hooks__checkpoint=hook, resume=True)
    resumed.train()
    assert 'at iteration 5' in log_of(tmp_path)
    assert resumed.iter == 6


def test_early_stopping_stops(tmp_path: Path) -> None:
    hooks = [
        dict(type='EvaluationHook', interval=1, at_end=False),
        stock('EarlyStoppingHook', monitor='loss', stopping_threshold=1e9),
    ]
    runner = tiny_runner(tmp_path, custom_hooks=hooks)
    runner.train()
    assert runner.iter == 1
    assert 'Stopping threshold reached' in log_of(tmp_path)


def test_profiler_writes_a_trace(tmp_path: Path) -> None:
    trace = tmp_path / 'trace.json'
    hook = stock(
        'ProfilerHook',
        by_epoch=False,
        profile_times=2,
        activity_with_cuda=False,
        json_trace_path=str(trace),
    )
    tiny_runner(tmp_path, custom_hooks=[hook]).train()
    assert json.loads(trace.read_text())['traceEvents']


@pytest.mark.parametrize('name', ['EmptyCacheHook', 'SyncBuffersHook', 'DistSamplerSeedHook'])
def test_hooks_without_options_change_nothing(name: str, tmp_path: Path) -> None:
    losses = []
    for hooks in ([], [stock(name), dict(type='EvaluationHook')]):
        runner = tiny_runner(tmp_path / str(len(hooks)), custom_hooks=hooks)
        runner.train()
        losses.append(runner.model.lm_head.weight.sum().item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ('options', 'named', 'instead'),
    [
        (dict(save_best='loss'), "save_best=['loss']", 'EvaluationHook'),
        (dict(published_keys=['state_dict']), "published_keys=['state_dict']", 'convert2hf'),
        (dict(by_epoch=True), 'by_epoch=True', 'by_epoch=False'),
        (dict(filename_tmpl=None), "filename_tmpl='iter_{}.pth'", "'iter_{}'"),
        (dict(max_keep_ckpts=1), 'max_keep_ckpts=1', 'StepCheckpointHook'),
    ],
)
def test_options_that_cannot_work_are_refused(options, named: str, instead: str) -> None:
    working = dict(interval=2, by_epoch=False, filename_tmpl='iter_{}')
    check_hook(CheckpointHook(**working))
    with pytest.raises(ValueError) as caught:
        check_hook(CheckpointHook(**{**working, **options}))
    assert f'CheckpointHook: {named}' in str(caught.value) and instead in str(caught.value)


def test_the_runner_refuses_before_it_trains(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'EMAHook .* WarmupStableDecay'):
        tiny_runner(tmp_path, custom_hooks=[stock('EMAHook')])


def test_a_subclass_may_vouch_for_itself() -> None:
    class ShardedEMAHook(EMAHook):
        works_on_sharded_models = True

    check_hook(ShardedEMAHook())
    with pytest.raises(ValueError, match='EMAHook'):
        check_hook(EMAHook())


def test_a_priority_in_the_config_is_kept_and_obeyed(tmp_path: Path) -> None:
    config = stock('EmptyCacheHook', priority='VERY_HIGH')
    runner = tiny_runner(tmp_path, custom_hooks=[config])
    assert type(runner.hooks[0]).__name__ == 'EmptyCacheHook'
    assert runner.cfg.custom_hooks[0].priority == 'VERY_HIGH'  # what checkpoints say of the run
