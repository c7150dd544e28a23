"""Runs with adapters: what their checkpoints hold, and how they go on."""

import shutil
from pathlib import Path

import pytest
import torch

from internlm_mm.checkpoint.peft_files import export_peft
from internlm_mm.checkpoint.pretrained import convert_to_hf, load_model
from internlm_mm.checkpoint.step_folders import read_model_state, read_state
from internlm_mm.engine.load_from import CONTENT, parse_load_from
from internlm_mm.engine.start import adopt_model
from internlm_mm.utils.config import load_config
from tests.helpers import tiny_runner

pytestmark = pytest.mark.filterwarnings('ignore:torch.distributed is disabled:UserWarning')

SAVE = dict(
    train_cfg__max_iters=4,
    default_hooks__checkpoint=dict(type='StepCheckpointHook', interval=2, keep_last=9),
)
ADAPTER = dict(model__adapter=dict(rank=4, dora=True, dropout=0.1), **SAVE)


@pytest.fixture(scope='module')
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`work`, a run of two steps, and `hf`, its export."""
    folder = tmp_path_factory.mktemp('base')
    tiny_runner(folder / 'work', **SAVE | {'train_cfg__max_iters': 2}).train()
    convert_to_hf(folder / 'work', folder / 'hf', dtype='float32')
    return folder


def weights(runner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in runner.model.named_parameters()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize('kind', ['work', 'hf'])
def test_a_run_goes_on_from_adapters_alone(base: Path, tmp_path: Path, kind: str) -> None:
    runner = tiny_runner(tmp_path, load_from=str(base / kind), **ADAPTER)
    runner.train()
    straight = weights(runner)
    frozen = load_model(base / kind)
    for name, parameter in frozen.named_parameters():
        assert torch.equal(straight[name], parameter), name
    stored = read_model_state(tmp_path / 'iter_4')
    assert set(stored) == {name for name in straight if '.lora_' in name}
    said = read_state(tmp_path / 'iter_4')['base']
    assert said['path'] == str(base / 'work' / 'iter_2' if kind == 'work' else base / 'hf')
    shutil.rmtree(tmp_path / 'iter_4')
    runner = tiny_runner(tmp_path, load_from=str(base / kind), resume=True, **ADAPTER)
    runner.train()
    assert_equal(weights(runner), straight)
    assert read_state(tmp_path / 'iter_4')['base'] == said
    ids = torch.randint(64, (2, 20))
    merged, ours = load_model(tmp_path).logits(ids), runner.model.eval().logits(ids)
    torch.testing.assert_close(merged, ours, rtol=1e-4, atol=1e-5)


def test_frozen_weights_may_have_been_moved(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / 'hf', tmp_path / 'hf')
    runner = tiny_runner(tmp_path / 'run', load_from=str(tmp_path / 'hf'), **ADAPTER)
    runner.train()
    straight = weights(runner)
    shutil.move(tmp_path / 'hf', tmp_path / 'moved')
    with pytest.raises(FileNotFoundError, match='say with load_from where they are now'):
        tiny_runner(tmp_path / 'run', resume=True, **ADAPTER).train()
    moved = dict(load_from=str(tmp_path / 'moved'), **ADAPTER)
    runner = tiny_runner(tmp_path / 'run', resume=True, **moved)
    runner.prepare_training()
    assert_equal(weights(runner), straight)
    path = dict(path=str(tmp_path / 'run'), base=str(tmp_path / 'moved'))
    runner = tiny_runner(tmp_path / 'next', **ADAPTER | {'load_from': path})
    runner.prepare_training()
    assert_equal(weights(runner), straight)
    assert runner.iter == 0 and runner.run_state.base.path == tmp_path / 'moved'
    wrong = dict(path=str(tmp_path / 'run'), base=str(base / 'work'))
    with pytest.raises(ValueError, match='adapters of other weights'):
        tiny_runner(tmp_path / 'other', **ADAPTER | {'load_from': wrong}).prepare_training()


def test_without_a_base_checkpoints_are_whole(tmp_path: Path) -> None:
    runner = tiny_runner(tmp_path, **ADAPTER)
    runner.train()
    straight = weights(runner)
    assert set(read_model_state(tmp_path / 'iter_4')) == set(straight)
    assert 'base' not in read_state(tmp_path / 'iter_4')
    shutil.rmtree(tmp_path / 'iter_4')
    runner = tiny_runner(tmp_path, resume=True, **ADAPTER)
    runner.train()
    assert_equal(weights(runner), straight)
    runner = tiny_runner(tmp_path / 'next', load_from=str(tmp_path), **ADAPTER)
    runner.prepare_training()
    assert_equal(weights(runner), straight)
    assert runner.run_state.base is None


def test_adapters_of_peft_are_laid_over(base: Path, tmp_path: Path) -> None:
    runner = tiny_runner(tmp_path / 'run', load_from=str(base / 'hf'), **ADAPTER)
    runner.train()
    export_peft(tmp_path / 'run', tmp_path / 'peft')
    said = dict(path=str(base / 'hf'), adapter=str(tmp_path / 'peft'))
    again = tiny_runner(tmp_path / 'next', **ADAPTER | {'load_from': said})
    again.prepare_training()
    assert_equal(weights(again), weights(runner))
    other = dict(model__adapter=dict(rank=4, alpha=8.0, dora=True), **SAVE, load_from=said)
    with pytest.raises(ValueError, match=r'model\.adapter\.alpha=8\.0, but .*alpha=32\.0'):
        tiny_runner(tmp_path / 'other', **other).prepare_training()
    with pytest.raises(ValueError, match=r'the model has none: set model\.adapter'):
        tiny_runner(tmp_path / 'other', load_from=said).prepare_training()
    config = load_config(Path(__file__).parents[1] / 'configs' / 'tiny.py')
    config.load_from, config.model = said, {'max_seq_len': 32}
    adopt_model(config)
    assert config.model['adapter']['rank'] == 4 and config.model['adapter']['dora'] is True
    assert 'q_proj' in config.model['adapter']['targets']  # all layers of the model: short names


def test_frozen_weights_in_four_bits(base: Path, tmp_path: Path) -> None:
    pytest.importorskip('bitsandbytes')
    adapter = dict(rank=4, four_bit=True)
    options = SAVE | dict(model__adapter=adapter, load_from=str(base / 'hf'))
    runner = tiny_runner(tmp_path / 'run', **options)
    runner.train()
    layer = runner.model.layers['0'].mlp.up_proj
    assert layer.weight.dtype == torch.uint8 and layer.weight.numel() == 48 * 32 // 2
    straight = weights(runner)
    assert all('.lora_' in name for name in read_model_state(tmp_path / 'run' / 'iter_4'))
    shutil.rmtree(tmp_path / 'run' / 'iter_4')
    runner = tiny_runner(tmp_path / 'run', resume=True, **options)
    runner.train()
    assert_equal(weights(runner), straight)
    assert load_model(tmp_path / 'run').layers['0'].mlp.up_proj.weight.shape == (48, 32)


def test_four_bits_of_random_weights_train_where_nothing_is_saved(tmp_path: Path) -> None:
    pytest.importorskip('bitsandbytes')
    runner = tiny_runner(tmp_path, model__adapter=dict(rank=4, four_bit=True))
    runner.train()
    assert runner.model.layers['0'].mlp.up_proj.weight.dtype == torch.uint8
    assert runner.iter == 6 and not list(tmp_path.glob('iter_*'))


def test_four_bits_need_a_base_and_a_package(base: Path, tmp_path: Path, monkeypatch) -> None:
    adapter = dict(model__adapter=dict(rank=4, four_bit=True))
    with pytest.raises(ValueError, match='set load_from to the weights that they belong to'):
        tiny_runner(tmp_path, **SAVE | adapter).prepare_training()
    adapter['load_from'] = str(base / 'hf')
    offload = dict(strategy__offload=True, **adapter)
    with pytest.raises(ValueError, match=r'four_bit=True .*does not go with strategy\.offload'):
        tiny_runner(tmp_path, **offload).prepare_training()
    monkeypatch.setattr('internlm_mm.ops.needs.find_spec', lambda name: None)
    with pytest.raises(ValueError, match=r"bitsandbytes, which is not installed: .*\[qlora\]'"):
        tiny_runner(tmp_path, **adapter).prepare_training()


def test_what_does_not_belong_together_is_told(base: Path, tmp_path: Path) -> None:
    tiny_runner(tmp_path / 'run', load_from=str(base / 'work'), **ADAPTER).train()
    with pytest.raises(ValueError, match=r'holds adapters, and this model has none: set model\.ad'):
        tiny_runner(tmp_path / 'other', load_from=str(tmp_path / 'run')).prepare_training()
    other = dict(model__adapter=dict(rank=8, dora=True), load_from=str(tmp_path / 'run'))
    with pytest.raises(ValueError, match=r"lora_A.weight' has shape \[4, 32\] there and \[8, 32\]"):
        tiny_runner(tmp_path / 'other', **other).prepare_training()
    other = dict(model__adapter=dict(rank=4, alpha=1.0, dora=True), load_from=str(tmp_path / 'run'))
    tiny_runner(tmp_path / 'weaker', **other).prepare_training()
    log = next((tmp_path / 'weaker').rglob('*.log')).read_text()
    assert 'weights of the same shapes may mean something else' in log
    wider = dict(model__adapter=dict(rank=4), model__hidden_size=64, load_from=str(base / 'hf'))
    with pytest.raises(ValueError, match=r'model\.hidden_size=64, but .*hidden_size=32'):
        tiny_runner(tmp_path / 'other', **wider).prepare_training()


@pytest.mark.parametrize(
    ('changes', 'name'),
    [
        (ADAPTER, 'layers.0.self_attn.q_proj.lora_A.weight'),
        (SAVE | dict(model__objective=dict(type='PairwiseReward')), 'objective.score.weight'),
    ],
)
def test_a_run_that_trained_less_cannot_be_gone_on_with(
    base: Path, tmp_path: Path, changes: dict, name: str
) -> None:
    message = rf"iter_2 was trained without '{name}', which .*load_from=\S+work/iter_2"
    with pytest.raises(ValueError, match=message):
        tiny_runner(tmp_path, resume=str(base / 'work' / 'iter_2'), **changes).prepare_training()


def test_keys_are_told_apart() -> None:
    assert parse_load_from('x') == ('x', ('model',), {})
    said = dict(path='x', content=['model', 'data'], base='y', format='hf')
    assert parse_load_from(said) == ('x', ('model', 'data'), {'base': 'y', 'format': 'hf'})
    with pytest.raises(ValueError, match=r"'modle' is unknown\. Did you mean 'model'"):
        parse_load_from(dict(path='x', content=['modle']))
    with pytest.raises(ValueError, match='expected dict'):
        parse_load_from(dict(content=['model']))
    with pytest.raises(ValueError, match=r"from\.bases='y' is unknown\. Did you mean 'base'\?"):
        parse_load_from(dict(path='x', bases='y'))
    assert CONTENT[0] == 'model'
