import json
import os
import signal
from itertools import count
from pathlib import Path

import pytest
import torch

from internlm_mm.checkpoint.step_folders import list_checkpoints
from internlm_mm.engine.train_cli import main, parse_args, resolve_config
from internlm_mm.utils.signals import REQUEUE_EXIT_CODE
from tests.helpers import TINY

NUMBERS = count()
CHECKPOINTS = [
    'default_hooks.checkpoint.type=StepCheckpointHook',
    'default_hooks.checkpoint.interval=2',
]


def run(folder: Path, *options: str, flags: tuple[str, ...] = ()) -> int:
    arguments = [str(TINY), '--work-dir', str(folder), *flags]
    # MMEngine warns of two runs of one name in one second.
    return main([*arguments, '--cfg-options', f'experiment_name=cli_{next(NUMBERS)}', *options])


def error_line(capsys: pytest.CaptureFixture) -> str:
    """What was printed, which must be one line and no traceback."""
    captured = capsys.readouterr().err.strip()
    assert 'Traceback' not in captured
    last = captured.splitlines()[-1]
    return last


def test_a_run_ends_with_0(tmp_path: Path) -> None:
    assert run(tmp_path / 'run', *CHECKPOINTS) == 0
    assert [p.name for p in list_checkpoints(tmp_path / 'run')] == ['iter_2', 'iter_4', 'iter_6']


def test_arguments_become_config(tmp_path: Path) -> None:
    config = resolve_config(
        parse_args([str(TINY), '--work-dir', str(tmp_path), '--resume', '--load-from', 'x',
                    '--cfg-options', 'train_cfg.max_iters=3', 'randomness.seed=7'])
    )  # fmt: skip
    assert (config.work_dir, config.resume, config.load_from) == (str(tmp_path), True, 'x')
    assert (config.train_cfg.max_iters, config.randomness.seed) == (3, 7)
    assert config.launcher == 'none'
    config = resolve_config(parse_args([str(TINY), '--resume', 'runs/a']))
    assert config.resume == 'runs/a'
    assert config.work_dir == 'work_dirs/tiny'


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['train_cfg.max_itres=3'], 'max_iters'),
        (['optim_wraper.clip_grad=None'], 'optim_wrapper'),
        (['model.type=InternML'], 'InternLM'),
        (['model.num_heads=5'], 'num_heads=5 does not divide hidden_size=32'),
        (['model.max_seq_len=16'], 'train_dataloader.dataset.seq_len=32 is longer'),
        (['train_dataloader.dataset.vocab_size=65'], 'vocabulary of 65'),
        (['train_cfg.micro_batch_size=3'], '3'),
        (['strategy.parallel.data_shard=2'], 'there are 1'),
        (['strategy.precision.param=float23'], "'float23' is not a floating-point dtype"),
        (['strategy.attention=flash'], "attention='flash' is unknown"),
        (['resume=nowhere'], 'nowhere does not exist'),
        (['load_from=nowhere'], 'nowhere does not exist'),
        (['load_from.path=x', 'load_from.content=(weights,)'], "'weights' is unknown"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path: Path, capsys, options, message) -> None:
    assert run(tmp_path / 'run', *options) == 2
    assert message in error_line(capsys)


def test_a_config_that_is_not_there(capsys) -> None:
    assert main(['configs/no_such_thing.py']) == 2
    assert 'no_such_thing.py' in error_line(capsys)


def test_a_work_dir_that_cannot_be_written(tmp_path: Path, capsys) -> None:
    (tmp_path / 'file').write_text('')
    assert run(tmp_path / 'file' / 'run') == 2
    assert 'work_dir' in error_line(capsys)


def test_unknown_arguments_end_with_2(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(TINY), '--lancher', 'slurm'])
    assert stopped.value.code == 2
    with pytest.raises(SystemExit):
        main([str(TINY), '--launcher', 'slrum'])
    assert 'slurm' in capsys.readouterr().err


def test_an_error_in_the_middle_has_a_traceback(tmp_path: Path, capsys, monkeypatch) -> None:
    def broken(self, *args, **kwargs):
        raise ValueError('in a step')

    monkeypatch.setattr('internlm_mm.engine.loops.TokenTrainLoop.run_iter', broken)
    assert run(tmp_path / 'run') == 1
    text = capsys.readouterr().err
    assert 'Traceback' in text and 'in a step' in text


def test_dry_run_trains_nothing(tmp_path: Path, capsys) -> None:
    assert run(tmp_path / 'run', flags=('--dry-run',)) == 0
    assert 'nothing was trained' in capsys.readouterr().out
    assert not (tmp_path / 'run').exists()


def test_stopped_by_a_signal(tmp_path: Path, monkeypatch) -> None:
    plain = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *args, **kwargs)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    try:
        assert run(tmp_path / 'run', *CHECKPOINTS) == REQUEUE_EXIT_CODE == 75
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    # The signal came in step 1 and is seen at the beginning of the next, which ends the run.
    assert [p.name for p in list_checkpoints(tmp_path / 'run')] == ['iter_2']


def test_a_rehearsal_is_printed_and_written(tmp_path: Path, capsys) -> None:
    file = tmp_path / 'rehearsal.json'
    flags = ('--rehearse', '4', '--gpus-per-node', '2', '--rehearse-rank', '3')
    options = ('train_cfg.micro_batch_size=1', 'strategy.parallel.data_shard=4')
    folder = tmp_path / 'run'
    assert run(folder, *options, flags=(*flags, '--rehearse-json', str(file))) == 0
    page = capsys.readouterr().out
    assert 'rehearsal  4 GPUs: 2 nodes of 2' in page and 'rank 3: node 1, GPU 1' in page
    report = json.loads(file.read_text())
    assert [rank['rank'] for rank in report['ranks']] == [3]
    assert not folder.exists()


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (('--rehearse', '0'), '--rehearse 0: a job has at least 1 GPU'),
        (('--rehearse', '8'), 'take a multiple of 16, for example 16'),
        (('--rehearse', '2', '--launcher', 'pytorch'), '--rehearse'),
        (('--rehearse', '2', '--dry-run'), '--dry-run and --rehearse 2: give one of them'),
        (('--rehearse-rank', '1'), '--rehearse-rank needs --rehearse'),
        (('--rehearse-json', 'x.json'), '--rehearse-json needs --rehearse'),
        (('--gpus-per-node', '4'), '--gpus-per-node needs --rehearse'),
    ],
)
def test_a_rehearsal_that_cannot_be(tmp_path: Path, capsys, flags, message) -> None:
    assert run(tmp_path / 'run', flags=flags) == 2
    assert message in error_line(capsys)
