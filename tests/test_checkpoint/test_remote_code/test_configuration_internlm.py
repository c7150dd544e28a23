"""InternLM's words for what transformers' Llama is configured with."""

import copy

import pytest
from transformers import LlamaConfig

from internlm_mm.checkpoint.remote_code.configuration_internlm import InternLMConfig
from internlm_mm.models.hf_layouts import from_internlm_config, to_internlm_config
from tests.test_models.test_hf_layouts import ROPES, llama


@pytest.mark.parametrize('rope', ROPES, ids=lambda rope: rope['rope_type'])
@pytest.mark.parametrize('bias', [True, False])
def test_is_the_llama_of_the_same_words(rope, bias):
    said = llama(rope_parameters=rope, attention_bias=bias)
    config = InternLMConfig(**to_internlm_config(said))
    wanted = LlamaConfig(**copy.deepcopy(said))
    assert config.attention_bias is bias
    assert config.rope_parameters == wanted.rope_parameters
    for key in ('num_key_value_heads', 'head_dim', 'rms_norm_eps', 'max_position_embeddings'):
        assert getattr(config, key) == getattr(wanted, key)


@pytest.mark.parametrize('rope', ROPES, ids=lambda rope: rope['rope_type'])
def test_what_is_saved_is_read_again(tmp_path, rope):
    said = to_internlm_config(llama(rope_parameters=rope))
    config = InternLMConfig(**said)
    config.save_pretrained(tmp_path)
    saved = InternLMConfig.get_config_dict(tmp_path)[0]
    for key in said.keys() - {'dtype', 'torch_dtype', 'architectures'}:
        assert saved[key] == said[key], key
    assert not {'attention_bias', 'rope_parameters', 'num_key_value_heads'} & set(saved)
    again = InternLMConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert from_internlm_config(saved)['rope_parameters'] == config.rope_parameters


def test_defaults_are_internlm_7b():
    config = InternLMConfig()
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (103_168, 4096, 32)
    assert config.bias is config.attention_bias is True
    assert config.rotary == {'base': 10_000.0, 'type': 'origin'}


def test_dynamic_without_a_factor():
    """As in the config.json of internlm-chat-7b."""
    config = InternLMConfig(rotary={'base': 10000, 'type': 'dynamic'})
    assert config.rope_parameters == {'rope_type': 'dynamic', 'rope_theta': 10000, 'factor': 1.0}


def test_words_can_be_changed_afterwards():
    config = InternLMConfig()
    config.bias = False
    config.rotary = {'base': 500.0, 'type': 'linear', 'scaling_factor': 2.0}
    assert config.attention_bias is False
    assert config.rope_parameters == {'rope_type': 'linear', 'rope_theta': 500.0, 'factor': 2.0}
    assert config.to_dict()['rotary'] == config.rotary
