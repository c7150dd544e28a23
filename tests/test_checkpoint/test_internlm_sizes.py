"""Sizes from a config, from shapes and from what is said beside them."""

import pytest
import torch
from mmengine.config import Config

from internlm_mm.checkpoint.internlm_shards import import_internlm
from tests.internlm_oracle import GROUPED, SIZES, full_state, write_shards


def check(folder, sizes, family, **options):
    config, _ = import_internlm(folder, **options)
    assert config == {'type': family, **sizes}


def test_heads_without_a_config(tmp_path):
    state = full_state(SIZES, biases=True)
    write_shards(tmp_path / 'x', state, SIZES, tp=2)
    with pytest.raises(ValueError, match=r'no file tells the number of heads.*--set num_heads=N'):
        import_internlm(tmp_path / 'x')
    check(tmp_path / 'x', SIZES, 'InternLM', settings={'num_heads': 4})


def test_heads_from_stored_frequencies(tmp_path):
    state = full_state(SIZES, biases=True)
    write_shards(tmp_path / 'x', state, SIZES, tp=2, pp=2, inv_freq=True)
    check(tmp_path / 'x', SIZES, 'InternLM')


def test_grouped_heads_from_shapes(tmp_path):
    state = full_state(GROUPED, biases=False)
    write_shards(tmp_path / 'x', state, GROUPED, kind='INTERNLM2_PUBLIC', tp=2, adapt_hf=False)
    settings = {'num_heads': 4, 'rope_theta': 1e6}
    with pytest.raises(ValueError, match='--set adapt_hf=False'):
        import_internlm(tmp_path / 'x', settings=settings)
    check(
        tmp_path / 'x', GROUPED, 'InternLM2', settings=settings | {'adapt_hf': False}
    )  # fmt: skip


@pytest.mark.parametrize('biases', [True, False])
def test_biases_from_names(tmp_path, biases):
    state = full_state(SIZES, biases=biases)
    write_shards(tmp_path / 'x', state, SIZES, tp=2, inv_freq=True)
    model, weights = import_internlm(tmp_path / 'x')
    assert model.get('attention_bias', True) is biases
    assert set(weights) == set(state)
    for name, weight in state.items():
        assert torch.equal(weights[name], weight), name


def test_stretched_positions_stay_where_they_were(tmp_path):
    said = {'use_dynamic_ntk_rope': True, 'max_position_embeddings': 512}
    write_shards(tmp_path / 'x', full_state(SIZES, True), SIZES, inv_freq=True, config=said)
    config, _ = import_internlm(tmp_path / 'x', settings={'max_seq_len': 8192})
    assert config['max_seq_len'] == 8192
    assert config['rope_scaling'] == {
        'rope_type': 'dynamic', 'factor': 1.0, 'original_max_position_embeddings': 512
    }  # fmt: skip


def test_settings_win(tmp_path):
    write_shards(tmp_path / 'x', full_state(SIZES, True), SIZES, config={})
    config, _ = import_internlm(tmp_path / 'x', settings={'max_seq_len': 8192, 'norm_eps': 1e-6})
    assert config['max_seq_len'] == 8192 and config['norm_eps'] == 1e-6


def test_a_config_of_objects_is_passed_over(tmp_path, caplog):
    state = full_state(SIZES, biases=True)
    write_shards(tmp_path / 'x', state, SIZES, inv_freq=True)
    torch.save(Config(dict(num_layers=4)), tmp_path / 'x' / 'model_config.pt')
    check(tmp_path / 'x', SIZES, 'InternLM')
    assert 'sizes are taken from shapes' in caplog.text and 'mmengine' in caplog.text


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ({'num_layers': 5}, 'says num_layers=5, but the shards hold 4'),
        ({'vocab_size': 97}, 'says vocab_size=97, but the shards hold 96'),
        ({'num_attention_heads': 5}, 'num_heads=5 does not fit hidden_size=32'),
        ({'norm_type': 'layernorm'}, "norm_type='layernorm' is not done here, 'rmsnorm' is"),
        ({'is_reward': True}, 'is_reward=True is not done here'),
        ({'num_experts': 4}, 'num_experts=4 is not done here'),
    ],
)
def test_configs_that_do_not_fit(tmp_path, config, message):
    write_shards(tmp_path / 'x', full_state(SIZES, True), SIZES, config=config)
    with pytest.raises(ValueError, match=message):
        import_internlm(tmp_path / 'x')


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'num_head': 4}, r"num_head=4 is no setting of InternLM\. Did you mean 'num_heads'"),
        ({'hidden_size': 64}, 'hidden_size=64 was set, but the shards hold 32'),
        ({'num_heads': 3}, 'num_heads=3 does not fit'),
    ],
)
def test_settings_that_do_not_fit(tmp_path, settings, message):
    write_shards(tmp_path / 'x', full_state(SIZES, True), SIZES, config={})
    with pytest.raises(ValueError, match=message):
        import_internlm(tmp_path / 'x', settings=settings)
