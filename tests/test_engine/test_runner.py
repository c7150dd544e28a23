import re
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook

from internlm_mm.checkpoint.storage import StoredTensors
from internlm_mm.engine import LLMRunner
from internlm_mm.parallel.mesh import Layout
from internlm_mm.utils.config import check_config, load_config
from tests.helpers import tiny_config, tiny_runner

CHECKPOINT = dict(type='StepCheckpointHook', interval=6)


def test_training_from_the_dump_repeats_the_run(tmp_path: Path) -> None:
    first = tiny_runner(tmp_path / 'a', default_hooks__checkpoint=CHECKPOINT)
    first.train()
    dumps = [tmp_path / 'a' / 'tiny.py', tmp_path / 'a' / 'iter_6' / 'config.py']
    for index, dump in enumerate(dumps):
        config = load_config(dump)
        config.work_dir = str(tmp_path / f'again_{index}')
        check_config(config)
        LLMRunner.from_cfg(config).train()
        one, two = (
            StoredTensors(Path(folder) / 'iter_6') for folder in (tmp_path / 'a', config.work_dir)
        )
        assert list(one) == list(two)
        for name in one:
            assert torch.equal(one[name], two[name]), name


def test_two_runs_that_begin_in_one_second_share_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr('time.time', lambda: 1e9)
    runners = [tiny_runner(tmp_path / name, experiment_name='run') for name in ('a', 'b', 'c')]
    assert len({runner.experiment_name for runner in runners}) == 3
    for part in ('logger', 'visualizer', 'message_hub', 'default_scope'):
        assert len({id(getattr(runner, part)) for runner in runners}) == 3, part
    for runner in runners:
        runner.logger.info(f'this is {runner.work_dir}')
        (log,) = Path(runner.work_dir).glob(f'{runner.timestamp}/*.log')
        said = [line for line in log.read_text().splitlines() if 'this is' in line]
        assert len(said) == 1 and said[0].endswith(runner.work_dir)


def test_two_runs_are_equal_and_a_seed_makes_another(tmp_path: Path) -> None:
    runs = []
    for index, seed in enumerate((1, 1, 2)):
        runner = tiny_runner(tmp_path / str(index), randomness=dict(seed=seed))
        runner.train()
        runs.append(runner.model.state_dict())
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name
    assert not torch.equal(runs[0]['lm_head.weight'], runs[2]['lm_head.weight'])


@pytest.mark.parametrize('missing', ['val_cfg', 'val_dataloader'])
def test_half_an_evaluation_is_refused(tmp_path: Path, missing: str) -> None:
    with pytest.raises(ValueError, match='val_dataloader and val_cfg go together'):
        LLMRunner.from_cfg(config_without(tmp_path, missing))


def config_without(folder: Path, *keys: str):
    config = tiny_config(folder)
    for key in keys:
        config[key] = None
    return config


def test_evaluation_needs_its_config(tmp_path: Path) -> None:
    runner = LLMRunner.from_cfg(config_without(tmp_path, 'val_cfg', 'val_dataloader'))
    with pytest.raises(ValueError, match='val needs val_cfg, and val_dataloader or'):
        runner.val()


def test_evaluation_of_what_the_same_config_has_trained(tmp_path: Path) -> None:
    """Also where the config still says how to train: the loop is never built."""
    checkpoint = dict(type='StepCheckpointHook', interval=1)
    options = dict(train_cfg__max_iters=1, default_hooks=dict(checkpoint=checkpoint))
    trained = tiny_runner(tmp_path / 'run', **options)
    trained.train()
    expected = trained.val_loop.run()
    again = tiny_runner(tmp_path / 'again', load_from=str(tmp_path / 'run'), **options)
    assert again.val() == expected


def test_training_needs_its_config(tmp_path: Path) -> None:
    keys = ('train_cfg', 'train_dataloader', 'optim_wrapper', 'param_scheduler')
    runner = LLMRunner.from_cfg(config_without(tmp_path, *keys))
    with pytest.raises(
        ValueError, match='train needs train_dataloader, train_cfg and optim_wrapper'
    ):
        runner.train()


def test_a_work_dir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    with pytest.raises(PermissionError, match=re.escape(f"work_dir='{tmp_path / 'file' / 'run'}'")):
        tiny_runner(tmp_path / 'file' / 'run')


@pytest.mark.parametrize(
    'options', [{'filename': 'epoch_6'}, {'filename': 'iter_5', 'by_epoch': True}]
)
def test_names_no_tool_would_find_are_refused(tmp_path: Path, options: dict) -> None:
    runner = tiny_runner(tmp_path)
    runner.train()
    with pytest.raises(ValueError, match="folders are called iter_N, here 'iter_6'"):
        runner.save_checkpoint(str(tmp_path), **options)


def test_hooks_add_to_the_state_and_read_it_back(tmp_path: Path) -> None:
    class Keeper(Hook):
        def __init__(self) -> None:
            self.read = None

        def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
            checkpoint['keeper'] = {'secret': 42}

        def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
            self.read = checkpoint['keeper']

    tiny_runner(tmp_path, hooks=[Keeper()], default_hooks__checkpoint=CHECKPOINT).train()
    again = Keeper()
    runner = tiny_runner(tmp_path, hooks=[again], resume=True, train_cfg__max_iters=7)
    runner.train()
    assert again.read == {'secret': 42}
    assert runner.iter == 7


def test_bad_load_from(tmp_path: Path) -> None:
    for load_from, message in [
        ({'content': ['model']}, r'expected dict\(path=\.\.\., content='),
        ({'path': 'x', 'contents': []}, r"contents=.*Did you mean 'content'"),
        ({'path': 'x', 'content': ['modle']}, "'modle' is unknown. Did you mean 'model'"),
    ]:
        with pytest.raises(ValueError, match=message):
            tiny_runner(tmp_path, load_from=load_from).train()


def test_rows_of_an_evaluation_fit_the_layout_too(tmp_path: Path) -> None:
    """Found before training, and not after hours, or never: ranks would leave tokens out."""
    runner = tiny_runner(tmp_path, val_dataloader__dataset__seq_len=30)
    runner.strategy.layout = Layout(context=2)
    with pytest.raises(ValueError, match=r'context=2.*val_dataloader\.dataset\.seq_len=30'):
        runner.train()


def test_a_model_that_only_looks_alike_is_told(tmp_path: Path, caplog) -> None:
    options = dict(default_hooks__checkpoint=dict(type='StepCheckpointHook', interval=2))
    tiny_runner(tmp_path, train_cfg__max_iters=2, **options).train()
    for changes, told in (({}, False), ({'model__num_heads': 4}, True)):
        caplog.clear()
        runner = tiny_runner(tmp_path, train_cfg__max_iters=3, resume=True, **options, **changes)
        runner.logger.addHandler(caplog.handler)
        runner.train()
        assert ('model.num_heads=4 differs from 2' in caplog.text) == told


def test_a_run_that_is_named_wins_over_load_from(tmp_path):
    saving = {'default_hooks__checkpoint': {'type': 'StepCheckpointHook', 'interval': 2}}
    tiny_runner(tmp_path / 'old', train_cfg__max_iters=2, **saving).train()
    named = {'resume': str(tmp_path / 'old/iter_2'), 'load_from': 'not looked at'}
    runner = tiny_runner(tmp_path / 'new', train_cfg__max_iters=3, **saving, **named)
    runner.train()
    assert sorted(path.name for path in (tmp_path / 'new').glob('iter_*')) == ['iter_3']
