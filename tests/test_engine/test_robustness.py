"""What a run survives: kills, signals, crashes, damaged files, full disks.

A step's numbers are compared as hexadecimal floats and weights bit by bit: resuming is exact or
broken.
"""

import os
import pickle
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from internlm_mm.checkpoint.step_folders import list_checkpoints, read_model_state, verify
from internlm_mm.checkpoint.storage import StoredTensors
from internlm_mm.engine.train_cli import main
from internlm_mm.utils.signals import REQUEUE_EXIT_CODE
from tests.marks import slow
from tests.runs import FAULTY, Run, start_ranks, train

STEPS = 8


def trace(work_dir: Path, rank: int = 0) -> list[str]:
    return (work_dir / f'trace_{rank}.txt').read_text().splitlines()


def assert_same_run(work_dir: Path, reference: Path) -> None:
    """Every step ran as in the reference, also where it ran twice, and the end is the same."""
    expected = trace(reference)
    assert set(trace(work_dir)) == set(expected)
    assert trace(work_dir)[-1] == expected[-1]
    ours, theirs = (StoredTensors(folder / f'iter_{STEPS}') for folder in (work_dir, reference))
    assert list(ours) == list(theirs)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def tear(file: Path) -> None:
    """Cut a file's last bytes off."""
    with open(file, 'r+b') as opened:
        opened.truncate(file.stat().st_size - 7)


def flip(file: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Content of every file of the published checkpoints below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for checkpoint in list_checkpoints(folder)
        for path in sorted(checkpoint.rglob('*'))
        if path.is_file()
    }


@pytest.fixture(scope='session')
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work dir of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp('reference')
    code, text = train([FAULTY, '--work-dir', folder / 'work'], folder / 'log')
    assert code == 0, text
    return folder / 'work'


@pytest.fixture(scope='session')
def reference_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on two processes."""
    folder = tmp_path_factory.mktemp('reference_of_two')
    ranks = start_ranks([FAULTY, '--work-dir', folder / 'work'], folder / 'log')
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text
    return folder / 'work'


@pytest.fixture
def checkpoints(reference: Path, tmp_path: Path) -> Path:
    """A work dir with the reference's checkpoints of steps 4, 5 and 6."""
    for step in (4, 5, 6):
        shutil.copytree(reference / f'iter_{step}', tmp_path / 'work' / f'iter_{step}')
    return tmp_path / 'work'


def fault(kind: str, step: int, **options: object) -> list[str]:
    pairs = dict(kind=kind, step=step, **options)
    return ['--cfg-options', *(f'custom_hooks.1.{key}={value}' for key, value in pairs.items())]


def test_kill_at_any_moment_then_resume_is_bitwise(reference: Path, tmp_path: Path) -> None:
    chance = random.Random(time.time_ns())
    argv, log = [FAULTY, '--work-dir', tmp_path / 'work', '--resume'], tmp_path / 'log'
    told = []
    for step in sorted(chance.sample(range(1, STEPS), 2)):
        kind, delay = chance.choice(['kill', 'kill_in_save']), chance.uniform(0, 0.03)
        told.append((kind, step, delay))
        code, text = train([*argv, *fault(kind, step, delay=delay)], log)
        assert code == -signal.SIGKILL, (told, text)
    code, text = train(argv, log)
    assert code == 0, (told, text)
    assert_same_run(tmp_path / 'work', reference)


def test_kill_of_one_of_two_ranks_then_resume_is_bitwise(
    reference_of_two: Path, tmp_path: Path
) -> None:
    argv, log = [FAULTY, '--work-dir', tmp_path / 'work', '--resume'], tmp_path / 'log'
    ranks = start_ranks([*argv, *fault('kill_in_save', 4, rank=1, delay=0.003)], log)
    assert ranks[1].wait() == -signal.SIGKILL
    assert ranks[0].wait(50) not in (0, REQUEUE_EXIT_CODE), ranks[0].text
    ranks = start_ranks(argv, log)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text
    assert_same_run(tmp_path / 'work', reference_of_two)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT], ids=['SIGTERM', 'Ctrl-C'])
def test_a_signal_saves_and_asks_to_be_started_again(
    number: signal.Signals, reference: Path, tmp_path: Path
) -> None:
    # To the whole process group, as terminals and schedulers do: readers of data get it, too.
    work_dir, log = tmp_path / 'work', tmp_path / 'log'
    argv = [FAULTY, '--work-dir', work_dir, '--resume']
    options = fault('wait', 3, delay=0.5)
    options += ['default_hooks.checkpoint.interval=100', 'train_dataloader.num_workers=1']
    run = Run([*argv, *options], log)
    wait_for(lambda: (work_dir / 'waiting').exists(), run)
    os.killpg(run.process.pid, number)
    if number == signal.SIGTERM:  # launchers repeat themselves
        time.sleep(0.1)
        os.killpg(run.process.pid, number)
    assert run.wait() == REQUEUE_EXIT_CODE, run.text
    assert 'saved' in run.text and '--resume' in run.text
    assert 'Traceback' not in run.text
    (saved,) = list_checkpoints(work_dir)
    assert verify(saved) == []
    assert saved.name == 'iter_4'
    assert train(argv, log)[0] == 0
    assert_same_run(work_dir, reference)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    reference_of_two: Path, tmp_path: Path
) -> None:
    argv, log = [FAULTY, '--work-dir', tmp_path / 'work', '--resume'], tmp_path / 'log'
    ranks = start_ranks([*argv, *fault('signal', 3, rank=1)], log)
    assert [rank.wait() for rank in ranks] == [REQUEUE_EXIT_CODE] * 2, ranks[0].text
    assert len(trace(tmp_path / 'work', 0)) == len(trace(tmp_path / 'work', 1)) == 4
    ranks = start_ranks(argv, log)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text
    assert_same_run(tmp_path / 'work', reference_of_two)


def test_a_crash_of_one_rank_ends_the_others(tmp_path: Path) -> None:
    # The collective would wait far longer than `Run.wait`, which raises TimeoutError.
    slow = 'env_cfg.dist_cfg.timeout=1800'
    argv = [FAULTY, '--work-dir', tmp_path / 'work', *fault('raise', 2, rank=1), slow]
    ranks = start_ranks(argv, tmp_path / 'log')
    assert ranks[1].wait() == 1
    assert 'planted on rank 1' in ranks[1].text
    assert ranks[0].wait() not in (0, REQUEUE_EXIT_CODE), ranks[0].text


@pytest.mark.parametrize(
    ('harm', 'why'),
    [
        (lambda folder: tear(folder / 'shard_0.safetensors'), 'bytes instead of'),
        (lambda folder: flip(folder / 'shard_0.safetensors'), 'checksum differs'),
        (lambda folder: (folder / 'metadata.json').unlink(), 'metadata.json is missing'),
        (lambda folder: (folder / 'manifest.json').unlink(), 'manifest.json is missing'),
        (lambda folder: tear(folder / 'manifest.json'), 'manifest.json is damaged'),
        (lambda folder: flip(folder / 'state.json'), 'state.json is damaged'),
        (lambda folder: folder.rename(f'{folder}.tmp'), None),
    ],
    ids=['torn', 'bit', 'missing', 'no manifest', 'torn manifest', 'state', 'unfinished'],
)
def test_resume_takes_the_newest_whole_checkpoint(
    harm: Callable[[Path], object], why: str | None, checkpoints: Path, tmp_path: Path
) -> None:
    harm(checkpoints / 'iter_6')
    argv = [FAULTY, '--work-dir', checkpoints, '--resume', '--cfg-options', 'train_cfg.max_iters=6']
    code, text = train(argv, tmp_path / 'log')
    assert code == 0, text
    assert 'iter_5 at iteration 5' in text
    if why is not None:
        warned = [line for line in text.splitlines() if 'iter_6 is not whole' in line]
        assert len(warned) == 1 and why in warned[0], text
    assert verify(checkpoints / 'iter_6') == []


@pytest.mark.parametrize(
    ('option', 'harm', 'why'),
    [
        ('--resume', tear, 'bytes instead of'),
        ('--resume', flip, 'checksum'),
        ('--resume', Path.unlink, 'missing'),
        ('--load-from', flip, 'checksum'),
    ],
    ids=['torn', 'bit', 'missing', 'load_from'],
)
def test_a_damaged_checkpoint_that_was_asked_for_is_an_error(
    option: str, harm: Callable[[Path], object], why: str, checkpoints: Path, tmp_path: Path
) -> None:
    harm(checkpoints / 'iter_6' / 'shard_0.safetensors')
    before = snapshot(checkpoints)
    argv = [FAULTY, '--work-dir', checkpoints, option, checkpoints / 'iter_6']
    code, text = train(argv, tmp_path / 'log')
    assert code == 2
    last = text.splitlines()[-1]
    assert 'iter_6' in last and 'shard_0.safetensors' in last and why in last
    assert 'Traceback' not in text
    assert snapshot(checkpoints) == before


@pytest.mark.parametrize('async_save', [True, False])
def test_a_save_that_fails_is_told_and_harms_nothing(
    async_save: bool, checkpoints: Path, tmp_path: Path
) -> None:
    before = snapshot(checkpoints)
    argv = [
        FAULTY,
        '--work-dir',
        checkpoints,
        '--resume',
        '--cfg-options',
        'train_cfg.max_iters=50',
    ]
    argv += [
        'default_hooks.checkpoint.keep_last=1',
        f'default_hooks.checkpoint.async_save={async_save}',
    ]
    size = (checkpoints / 'iter_6' / 'shard_0.safetensors').stat().st_size
    code, text = train(argv, tmp_path / 'log', limit=size // 2)
    assert code == 1, text
    last = text.splitlines()[-1]
    assert 'iter_7' in last and 'File too large' in last and 'rank 0' in last, text
    assert len(trace(checkpoints)) < 10  # it did not train on for long
    after = snapshot(checkpoints)
    assert after.items() <= before.items()  # keep_last may have removed old ones, no more
    assert list_checkpoints(checkpoints)[-1].name == 'iter_6'
    assert verify(checkpoints / 'iter_6') == []


def test_a_save_that_fails_on_one_rank_is_told_by_all(tmp_path: Path) -> None:
    # Rank 1 cannot write its shard.
    work_dir = tmp_path / 'work'
    argv = [FAULTY, '--work-dir', work_dir, '--cfg-options', 'default_hooks.checkpoint.interval=3']
    ranks = start_ranks(argv, tmp_path / 'log', limits=(None, 20_000))
    assert [rank.wait() for rank in ranks] == [1, 1]
    assert 'File too large' in ranks[0].text
    assert list_checkpoints(work_dir) == []


def test_no_pickle_is_read(
    reference: Path, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [FAULTY, '--work-dir', checkpoints, '--resume']
    code, text = train(argv, tmp_path / 'log', prelude='tests.faults:forbid_pickle')
    assert code == 0 and 'iter_6 at iteration 6' in text, text
    monkeypatch.delattr(torch, 'load')
    for name in ('load', 'loads', 'Unpickler'):
        monkeypatch.delattr(pickle, name)
    weights = read_model_state(checkpoints)
    assert {name: weights[name].shape for name in weights}['norm.weight'] == (32,)


USER_ERRORS = {
    'work_dir': (['--work-dir', '{file}/work'], ["work_dir='{file}/work'", 'Not a directory']),
    'config': (['{tmp}/nothing.py'], ["no config '{tmp}/nothing.py'"]),
    'key': (['train_cfg.max_iter=4'], ['train_cfg.max_iter=4', "Did you mean 'max_iters'?"]),
    'type': (['model.type=InternML'], ["model.type='InternML'", "Did you mean 'InternLM'?"]),
    'top level': (['optim_wraper.lr=1'], ['optim_wraper', "Did you mean 'optim_wrapper'?"]),
    'length': (['train_dataloader.dataset.seq_len=128'], ['seq_len=128', 'max_seq_len=64']),
    'vocabulary': (['train_dataloader.dataset.vocab_size=99'], ['99', 'model.vocab_size=64']),
    'batch': (['train_cfg.global_batch_size=7'], ['global_batch_size=7', '6 or 8']),
    'heads': (['model.num_heads=3'], ['num_heads=3', 'hidden_size=32']),
    'loss scale': (['optim_wrapper.loss_scale.initail=2'], ['loss_scale', 'initail', "'initial'?"]),
    'clip': (['optim_wrapper.clip_grad.max_nrom=2'], ['clip_grad', 'max_nrom', 'max_norm']),
    'layout': (['strategy.parallel.data_shard=3'], ["'data_shard': 3", 'there are 1']),
    'content': (['load_from.path=x', 'load_from.content=[modle]'], ["'modle'", "'model'?"]),
    'no checkpoint': (
        ['--load-from', '{tmp}/nowhere', '--cfg-options', 'log_level=INFO'],
        ['{tmp}/nowhere does not exist'],
    ),
    'other model': (
        ['--resume', '{whole}', '--cfg-options', 'model.hidden_size=64'],
        ['iter_8', 'another model', "'model.embed_tokens.weight'", '[64, 32]', '[64, 64]'],
    ),
    'other depth': (
        ['--load-from', '{whole}', '--cfg-options', 'model.num_layers=3'],
        ['iter_8', 'another model', "'model.layers.2.", "Did you mean 'model.layers."],
    ),
}


@pytest.mark.parametrize('name', USER_ERRORS)
def test_mistakes_get_one_line_and_cost_nothing(
    name: str, reference: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The message names key, value and the nearest name; what is on disk stays as it was."""
    (tmp_path / 'file').touch()
    names = {'file': tmp_path / 'file', 'tmp': tmp_path, 'whole': reference / 'iter_8'}
    given, expected = ([text.format(**names) for text in texts] for texts in USER_ERRORS[name])
    argv = [] if given[0].endswith('.py') else [str(FAULTY)]
    if not any('work-dir' in word for word in given):
        argv += ['--work-dir', str(tmp_path / 'work')]
    argv += given if given[0][0] in '-/' else ['--cfg-options', *given]
    if '--cfg-options' in argv:  # MMEngine keeps loggers by this name
        argv.append(f'experiment_name={tmp_path.name}')
    before = snapshot(reference)
    assert main(argv) == 2
    error = capfd.readouterr().err
    assert 'Traceback' not in error
    last = error.strip().splitlines()[-1]
    for words in expected:
        assert words in last, error
    assert snapshot(reference) == before
    assert list_checkpoints(tmp_path / 'work') == []


def test_parts_of_a_checkpoint_can_be_taken(reference: Path, tmp_path: Path) -> None:
    """Each part changes what it should: compared with the runs that took nothing or everything."""
    first_steps = {}
    for content in ('model', 'model,optimizer', 'model,data', 'model,scheduler', 'data'):
        work_dir = tmp_path / content
        options = [f'load_from.path={reference / "iter_4"}', f'load_from.content=[{content}]']
        options += ['default_hooks.checkpoint=None']
        argv = [FAULTY, '--work-dir', work_dir, '--cfg-options', *options]
        code, text = train(argv, tmp_path / 'log')
        assert code == 0, text
        # step, loss, gradient norm, learning rate, skipped
        first_steps[content] = trace(work_dir)[0].split()
    whole, fresh = trace(reference)[4].split(), trace(reference)[0].split()
    steps = {content: int(step) for content, (step, *_) in first_steps.items()}
    assert steps == {content: 5 if 'scheduler' in content else 1 for content in steps}
    # The same rows and weights give the loss and the gradient of the fifth step.
    assert first_steps['model,data'][1:3] == whole[1:3]
    # With the weights alone the first rows come again.
    assert first_steps['model'][1] not in (whole[1], fresh[1])
    assert first_steps['model,optimizer'][1:4] == first_steps['model'][1:4]
    # The optimizer's moments show after the first update.
    second = {name: trace(tmp_path / name)[1].split()[1] for name in ('model', 'model,optimizer')}
    assert second['model'] != second['model,optimizer']
    assert first_steps['model,scheduler'][3] == whole[3] != fresh[3] == first_steps['model'][3]
    # Untrained weights on the fifth step's rows.
    assert first_steps['data'][1] not in (whole[1], fresh[1])


def test_loss_scale_goes_on(tmp_path: Path) -> None:
    """An overflow halves it, and a resumed run knows; the steps to its growth are counted on."""
    options = ('initial=8.', 'growth_interval=3', 'hysteresis=1')
    scale = [f'optim_wrapper.loss_scale.{option}' for option in options]
    argv = [FAULTY, '--work-dir', tmp_path / 'work', '--resume']
    argv += [*fault('inf_grad', 2), *scale]
    code, text = train([*argv, 'train_cfg.max_iters=4'], tmp_path / 'log')
    assert code == 0, text
    code, text = train(argv, tmp_path / 'log')
    assert code == 0, text
    skipped, scales = zip(*(line.split()[4:] for line in trace(tmp_path / 'work')), strict=True)
    assert skipped == ('0', '1', '1', '1', '1', '1', '1', '1')
    assert scales == ('8.0', '8.0', '4.0', '4.0', '4.0', '8.0', '8.0', '8.0')


@pytest.mark.parametrize(
    'axis',
    ['data_shard', slow('data_replicate'), slow('tensor'), slow('context'), 'pipeline'],
)
def test_a_bad_gradient_on_one_rank_is_skipped_by_all(tmp_path: Path, axis: str) -> None:
    """Losses, norms and what is left of the loss scale are the same on both, bit for bit."""
    argv = [FAULTY, '--work-dir', tmp_path / 'work', *fault('inf_grad', 3, rank=1)]
    scale = [f'optim_wrapper.loss_scale.{option}' for option in ('initial=8.', 'hysteresis=1')]
    ranks = start_ranks([*argv, f'strategy.parallel.{axis}=2', *scale], tmp_path / 'log')
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text
    assert trace(tmp_path / 'work', 0) == trace(tmp_path / 'work', 1)
    lines = [line.split() for line in trace(tmp_path / 'work')]
    assert [line[4] for line in lines] == ['0', '0'] + ['1'] * 6
    assert [line[5] for line in lines] == ['8.0'] * 3 + ['4.0'] * 5
    assert lines[2][2] in ('inf', 'nan')
    assert all(float.fromhex(line[1]) < 5 for line in lines)
    assert (
        'step skipped: gradient not finite' in ranks[0].text or 'skipped so far 1' in ranks[0].text
    )


def wait_for(is_true: Callable[[], bool], run: Run, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert run.process.is_alive() and time.monotonic() < deadline, run.text
        time.sleep(0.01)
