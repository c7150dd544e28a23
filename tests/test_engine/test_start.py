import logging
from pathlib import Path

import pytest
import torch

from internlm_mm.checkpoint.checkpointer import Checkpointer
from internlm_mm.engine.start import CONTENT, Start, choose_start
from tests.helpers import tiny_runner

LOG = logging.getLogger('test_start')


@pytest.fixture
def work_dir(tmp_path: Path) -> Path:
    """A work dir with two whole checkpoints."""
    for step in (2, 10):
        Checkpointer(async_save=False).save(tmp_path / f'iter_{step}', {'x': torch.ones(3)}, {})
    return tmp_path


def start(work_dir: Path, resume=False, load_from=None, training=True) -> Start | None:
    return choose_start(resume, load_from, work_dir, training, LOG)


def test_from_nothing(tmp_path: Path, caplog) -> None:
    assert start(tmp_path) is None
    with caplog.at_level(logging.INFO):
        assert start(tmp_path, resume=True) is None
    assert 'nothing to resume' in caplog.text


def test_resume_takes_everything_of_the_newest(work_dir: Path) -> None:
    newest = work_dir / 'iter_10'
    assert start(work_dir, resume=True) == Start(newest, CONTENT, True)
    assert start(work_dir, resume=True, training=False) == Start(newest, ('model',), False)
    assert start(work_dir, resume=str(work_dir / 'iter_2')).path == work_dir / 'iter_2'


def test_resume_passes_over_what_is_damaged(work_dir: Path, caplog) -> None:
    (work_dir / 'iter_10' / 'state.json').unlink()
    assert start(work_dir, resume=True).path == work_dir / 'iter_2'
    assert 'iter_10 is not whole (state.json is missing)' in caplog.text
    with pytest.raises(ValueError, match=r'state\.json'):
        start(work_dir, resume=str(work_dir / 'iter_10'))


def test_load_from_takes_what_it_says(work_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / 'other'
    assert start(other, load_from=str(work_dir)) == Start(work_dir / 'iter_10', ('model',), False)
    chosen = start(other, load_from={'path': str(work_dir), 'content': ['model', 'data']})
    assert chosen == Start(work_dir / 'iter_10', ('model', 'data'), False)


def test_resume_wins_over_load_from(work_dir: Path) -> None:
    both = start(work_dir, resume=True, load_from=str(work_dir / 'iter_2'))
    assert both.path == work_dir / 'iter_10'
    (work_dir / 'empty').mkdir()
    neither = start(work_dir / 'empty', resume=True, load_from=str(work_dir / 'iter_2'))
    assert neither == Start(work_dir / 'iter_2', ('model',), False)


@pytest.mark.parametrize(
    ('load_from', 'error', 'message'),
    [
        ('/nowhere', FileNotFoundError, '/nowhere does not exist'),
        ({'content': ['model']}, ValueError, 'expected dict'),
        ({'path': 'x', 'contents': ['model']}, ValueError, 'expected dict'),
        ({'path': 'x', 'content': ['modell']}, ValueError, "Did you mean 'model'?"),
    ],
)
def test_what_is_not_understood(tmp_path: Path, load_from, error, message: str) -> None:
    with pytest.raises(error, match=message):
        start(tmp_path, load_from=load_from)


def steps_of(work_dir: Path) -> list[str]:
    return sorted(path.name for path in work_dir.glob('iter_*'))


def saving(every: int, keep: int | None = None) -> dict:
    return {'type': 'StepCheckpointHook', 'interval': every, 'keep_last': keep}


def test_a_rewound_run_keeps_its_own_checkpoints(tmp_path: Path) -> None:
    tiny_runner(tmp_path, default_hooks__checkpoint=saving(2)).train()
    assert steps_of(tmp_path) == ['iter_2', 'iter_4', 'iter_6']
    tiny_runner(
        tmp_path, default_hooks__checkpoint=saving(1, keep=1), resume=str(tmp_path / 'iter_2'),
        train_cfg__max_iters=4,
    ).train()  # fmt: skip
    assert steps_of(tmp_path) == ['iter_4', 'iter_4.abandoned', 'iter_6.abandoned']
    assert start(tmp_path, resume=True).path == tmp_path / 'iter_4'


def test_a_new_run_in_a_used_folder_is_not_mixed_with_the_old(tmp_path: Path) -> None:
    tiny_runner(tmp_path, default_hooks__checkpoint=saving(6)).train()
    new = tiny_runner(tmp_path, default_hooks__checkpoint=saving(2, 1), train_cfg__max_iters=2)
    new.train()
    assert steps_of(tmp_path) == ['iter_2', 'iter_6.abandoned']


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    tiny_runner(tmp_path, default_hooks__checkpoint=saving(2), train_cfg__max_iters=4).train()
    (tmp_path / 'iter_4' / 'shard_0.safetensors').write_bytes(b'')
    tiny_runner(tmp_path, default_hooks__checkpoint=saving(1, keep=1), resume=True).train()
    assert steps_of(tmp_path) == ['iter_4.abandoned', 'iter_6']
    assert start(tmp_path, resume=True).path == tmp_path / 'iter_6'


def test_a_smaller_model_is_another_model(tmp_path: Path) -> None:
    tiny_runner(tmp_path, default_hooks__checkpoint=saving(6)).train()
    smaller = tiny_runner(tmp_path, model__num_layers=1, resume=True)
    with pytest.raises(ValueError, match=r"it holds 'model\.layers\.1\..*does not have"):
        smaller.train()


def test_a_start_that_fails_leaves_the_resolved_config_alone(tmp_path: Path) -> None:
    tiny_runner(tmp_path).train()
    before = (tmp_path / 'tiny.py').read_text()
    with pytest.raises(ValueError, match='num_heads=5'):
        tiny_runner(tmp_path, model__num_heads=5).train()
    assert (tmp_path / 'tiny.py').read_text() == before


def test_an_unnamed_seed_goes_on_with_the_run(tmp_path: Path) -> None:
    first = tiny_runner(
        tmp_path, randomness={'seed': None}, default_hooks__checkpoint=saving(6)
    )  # fmt: skip
    first.train()
    second = tiny_runner(tmp_path, randomness={'seed': None}, resume=True, train_cfg__max_iters=7)
    second.train()
    assert second.seed == first.seed
    assert second.train_dataloader.dataset.seed == first.seed
