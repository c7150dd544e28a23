"""InternLM's layouts: configs there and back, and the packing of InternLM2's projections."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from internlm_mm.models import Llama
from internlm_mm.models.hf_layouts import (
    from_internlm2_config,
    from_internlm_config,
    internlm2_layout,
    pack_wqkv,
    to_internlm2_config,
    to_internlm_config,
    unpack_wqkv,
)

LLAMA = {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'vocab_size': 512,
    'hidden_size': 64,
    'intermediate_size': 96,
    'num_hidden_layers': 2,
    'num_attention_heads': 8,
    'num_key_value_heads': 8,
    'head_dim': 8,
    'max_position_embeddings': 128,
    'rms_norm_eps': 1e-5,
    'hidden_act': 'silu',
    'attention_bias': True,
    'mlp_bias': False,
    'tie_word_embeddings': False,
    'attention_dropout': 0.0,
    'initializer_range': 0.006,
    'rope_theta': 5000.0,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 5000.0},
    'use_cache': True,
    'pad_token_id': 2,
    'bos_token_id': 1,
    'eos_token_id': 2,
    'dtype': 'bfloat16',
    'torch_dtype': 'bfloat16',
}
ROPES = [
    {'rope_type': 'default', 'rope_theta': 10000.0},
    {'rope_type': 'dynamic', 'rope_theta': 1000000, 'factor': 2.0},
    {'rope_type': 'linear', 'rope_theta': 500.0, 'factor': 4.0},
    {
        'rope_type': 'yarn',
        'rope_theta': 1e4,
        'factor': 4.0,
        'beta_fast': 16,
        'original_max_position_embeddings': 32,
    },
    {
        'rope_type': 'llama3',
        'rope_theta': 5e5,
        'factor': 8.0,
        'low_freq_factor': 1.0,
        'high_freq_factor': 4.0,
        'original_max_position_embeddings': 32,
    },
]


def llama(**changes):
    config = LLAMA | changes
    return config | {'rope_theta': config['rope_parameters']['rope_theta']}


@pytest.mark.parametrize('rope', ROPES, ids=lambda rope: rope['rope_type'])
@pytest.mark.parametrize('bias', [True, False])
def test_configs_come_back(rope, bias):
    config = llama(rope_parameters=rope, attention_bias=bias)
    assert from_internlm_config(to_internlm_config(config)) == config
    shared = config | {'num_key_value_heads': 2}
    assert from_internlm2_config(to_internlm2_config(shared)) == shared


def test_what_internlm_calls_it():
    config = to_internlm_config(llama(rope_parameters=ROPES[1]))
    assert config['model_type'] == 'internlm'
    assert config['architectures'] == ['InternLMForCausalLM']
    assert config['bias'] is True
    assert config['rotary'] == {'base': 1000000, 'type': 'dynamic', 'scaling_factor': 2.0}
    assert not {'attention_bias', 'num_key_value_heads', 'rope_theta', 'head_dim'} & set(config)
    assert to_internlm_config(llama())['rotary'] == {'base': 5000.0, 'type': 'origin'}


def test_what_internlm2_calls_it():
    config = to_internlm2_config(llama(rope_parameters=ROPES[1], num_key_value_heads=2))
    assert config['model_type'] == 'internlm2'
    assert config['architectures'] == ['InternLM2ForCausalLM']
    assert config['bias'] is True and config['num_key_value_heads'] == 2
    assert config['rope_theta'] == 1000000
    assert config['rope_scaling'] == {'type': 'dynamic', 'factor': 2.0}
    assert to_internlm2_config(llama())['rope_scaling'] is None


def test_as_on_the_hub():
    """Keys as in the config.json of published checkpoints, of 2023 and of 2024."""
    first = {
        'architectures': ['InternLMForCausalLM'],
        'auto_map': {'AutoConfig': 'configuration_internlm.InternLMConfig'},
        'bias': True,
        'hidden_act': 'silu',
        'hidden_size': 4096,
        'intermediate_size': 11008,
        'max_position_embeddings': 2048,
        'model_type': 'internlm',
        'num_attention_heads': 32,
        'num_hidden_layers': 32,
        'rms_norm_eps': 1e-06,
        'vocab_size': 103168,
    }
    config = from_internlm_config(first)
    assert config['rope_parameters'] == {'rope_type': 'default', 'rope_theta': 10_000.0}
    assert config['attention_bias'] is True and config['head_dim'] == 128
    assert 'auto_map' not in config and 'bias' not in config
    dynamic = from_internlm_config(first | {'rotary': {'base': 10000, 'type': 'dynamic'}})
    assert dynamic['rope_parameters'] == {
        'rope_type': 'dynamic',
        'rope_theta': 10000,
        'factor': 1.0,
    }
    second = first | {
        'architectures': ['InternLM2ForCausalLM'],
        'model_type': 'internlm2',
        'attn_implementation': 'eager',
        'bias': False,
        'num_key_value_heads': 8,
        'rope_theta': 1000000,
        'rope_scaling': {'type': 'dynamic', 'factor': 2.0},
    }
    config = from_internlm2_config(second)
    assert config['attention_bias'] is False and config['num_key_value_heads'] == 8
    assert config['rope_parameters'] == {
        'rope_type': 'dynamic',
        'rope_theta': 1000000,
        'factor': 2.0,
    }


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'num_key_value_heads': 2}, 'num_key_value_heads=num_attention_heads=8, not 2'),
        ({'head_dim': 16}, "'internlm' has head_dim=8, not 16"),
        ({'mlp_bias': True}, 'mlp_bias=False, not True'),
        ({'model_type': 'qwen3'}, "model_type='qwen3' is not 'llama'"),
    ],
)
def test_what_cannot_be_said(change, message):
    with pytest.raises(ValueError, match=message):
        to_internlm_config(llama(**change))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.booleans())
def test_wqkv_comes_back(kv_heads, group, head_dim, hidden, is_bias):
    heads = kv_heads * group
    shape = () if is_bias else (hidden,)
    q = torch.randn(heads * head_dim, *shape)
    k, v = (torch.randn(kv_heads * head_dim, *shape) for _ in range(2))
    packed = pack_wqkv(q, k, v, heads, kv_heads)
    assert packed.shape == ((heads + 2 * kv_heads) * head_dim, *shape)
    for part, again in zip((q, k, v), unpack_wqkv(packed, heads, kv_heads), strict=True):
        assert torch.equal(part, again) and again.is_contiguous()


def test_order_in_wqkv():
    """4 query heads on 2 key heads, one row each: the rows are named by hand."""
    q, k, v = torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])
    packed = pack_wqkv(q, k, v, num_heads=4, num_kv_heads=2)
    assert packed.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_shapes_that_do_not_belong_together():
    q, k = torch.zeros(32, 8), torch.zeros(16, 8)
    with pytest.raises(ValueError, match='num_kv_heads=3 does not divide num_heads=4'):
        pack_wqkv(q, k, k, 4, 3)
    with pytest.raises(ValueError, match=r'should be \[32, 8\]'):
        pack_wqkv(q, k, k, 4, 4)
    with pytest.raises(ValueError, match='30 rows are no whole number of heads'):
        unpack_wqkv(torch.zeros(30, 8), 4, 2)


def test_every_weight_of_ours_has_a_name():
    """The file's names as they are documented, each with what of ours it holds."""
    with torch.device('meta'):
        model = Llama(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=12, num_heads=4
        )
    groups = internlm2_layout(4, 4).groups(name for name, _ in model.named_parameters())
    own = {name: len(parts) for name, parts in groups.items() if '.layers.' not in name}
    assert own == {
        'model.tok_embeddings.weight': 1,
        'model.norm.weight': 1,
        'output.weight': 1,
    }
    eleventh = {name.split('.11.')[1]: parts for name, parts in groups.items() if '.11.' in name}
    assert {name: len(parts) for name, parts in eleventh.items()} == {
        'attention.wqkv.weight': 3,
        'attention.wo.weight': 1,
        'feed_forward.w1.weight': 1,
        'feed_forward.w2.weight': 1,
        'feed_forward.w3.weight': 1,
        'attention_norm.weight': 1,
        'ffn_norm.weight': 1,
    }
    assert eleventh['feed_forward.w2.weight'] == ['layers.11.mlp.down_proj.weight']
    assert eleventh['feed_forward.w3.weight'] == ['layers.11.mlp.up_proj.weight']
