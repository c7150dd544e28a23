import logging
from pathlib import Path

import pytest
import torch

from internlm_mm.checkpoint.checkpointer import Checkpointer
from internlm_mm.checkpoint.huggingface import export_hf
from internlm_mm.engine.dry_run import dry_run
from internlm_mm.engine.start import CONTENT, Start, choose_start
from internlm_mm.models import InternLM
from tests.helpers import tiny_config, tiny_runner
from tests.internlm_oracle import SIZES, full_state, write_shards

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


# ---------------------------------------------------------------- weights of other programs

TINY_SIZES = SIZES | dict(
    vocab_size=64, num_layers=2, num_heads=2, max_seq_len=64, intermediate_size=48
)


@pytest.fixture(params=['hf', 'shards'])
def foreign(tmp_path: Path, request) -> tuple[Path, dict]:
    """A folder of another program with weights for the config of `tests/configs/tiny.py`."""
    state = full_state(TINY_SIZES, biases=True)
    folder = tmp_path / request.param
    if request.param == 'hf':
        with torch.device('meta'):
            model = InternLM(**TINY_SIZES)
        export_hf(model, state, folder, dtype='float32', verify=False)
    else:
        said = {'max_position_embeddings': 64}
        write_shards(folder, state, TINY_SIZES, tp=2, pp=2, config=said)
    return folder, state


def test_training_goes_on_from_other_programs_weights(tmp_path: Path, foreign) -> None:
    folder, state = foreign
    chosen = start(tmp_path / 'work', load_from=str(folder))
    assert chosen == Start(folder, ('model',), False, {})
    runner = tiny_runner(tmp_path / 'work', load_from=str(folder))
    runner.prepare_training()
    loaded = runner.model.state_dict()
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    tiny_runner(tmp_path / 'work', load_from=str(folder), train_cfg__max_iters=1).train()


def test_a_dry_run_says_what_will_be_loaded(tmp_path: Path, foreign) -> None:
    plan = dry_run(tiny_config(tmp_path / 'work', load_from=str(foreign[0])))
    form = "InternLM's own shards" if foreign[0].name == 'shards' else 'a Hugging Face folder'
    line = next(line for line in plan.splitlines() if line.startswith('start '))
    assert f'the weights of {foreign[0]}, {form}: InternLM, 29 tensors, 0.1 MiB in float32' in line


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('num_layers', 1, r'model\.num_layers=1, but .* is a InternLM with num_layers=2'),
        ('hidden_size', 64, r'model\.hidden_size=64, but .* with hidden_size=32'),
        ('norm_eps', 1e-6, r'model\.norm_eps=1e-06, but .* with norm_eps=1e-05'),
        ('type', 'Llama', r'is left over'),
    ],
)
def test_another_model_than_the_folders_is_refused(
    tmp_path: Path, foreign, key: str, value, message: str
) -> None:
    changes = {'load_from': str(foreign[0]), f'model__{key}': value}
    with pytest.raises(ValueError, match=message):
        tiny_runner(tmp_path / 'work', **changes).train()
    with pytest.raises(ValueError, match=message):
        dry_run(tiny_config(tmp_path / 'work', **changes))


def test_another_length_is_told(tmp_path: Path, foreign, caplog) -> None:
    plan = tiny_config(tmp_path / 'work', load_from=str(foreign[0]), model__max_seq_len=128)
    dry_run(plan)
    assert 'model.max_seq_len=128 differs from 64' in caplog.text


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'content': ['model', 'optimizer']}, r"\['model'\] alone and not 'optimizer'"),
        ({'format': 'internevoo'}, "Did you mean 'internevo'"),
        ({'settings': {'num_headz': 1}}, "Did you mean 'num_heads'"),
        ({'formatt': 'hf'}, 'expected dict'),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, foreign, options: dict, message: str) -> None:
    load_from = {'path': str(foreign[0]), **options}
    with pytest.raises(ValueError, match=message):
        dry_run(tiny_config(tmp_path / 'work', load_from=load_from))


def test_options_of_other_programs_with_a_checkpoint(work_dir: Path) -> None:
    with pytest.raises(ValueError, match=r'load_from\.format is for weights of other programs'):
        start(work_dir / 'x', load_from={'path': str(work_dir), 'format': 'hf'})


def test_settings_of_other_programs(tmp_path: Path) -> None:
    write_shards(tmp_path / 'x', full_state(TINY_SIZES, True), TINY_SIZES, tp=2)
    options = {'format': 'internlm-2023', 'settings': {'num_heads': 2}}
    load_from = {'path': str(tmp_path / 'x'), **options}
    plan = dry_run(tiny_config(tmp_path / 'work', load_from=load_from))
    assert "InternLM's own shards: InternLM, 29 tensors" in plan


def test_other_programs_have_no_run_to_resume(tmp_path: Path, foreign) -> None:
    with pytest.raises(ValueError, match='no run to go on with: use load_from'):
        start(tmp_path / 'work', resume=str(foreign[0]))


def test_a_damaged_folder_stops_before_training(tmp_path: Path, foreign) -> None:
    file = next(iter([*foreign[0].glob('*.safetensors'), *foreign[0].glob('model_tp1*')]))
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match=f'{file.name} is truncated'):
        tiny_runner(tmp_path / 'work', load_from=str(foreign[0])).train()
    assert not list((tmp_path / 'work').glob('iter_*'))
