"""InternLM2's words for what transformers' Llama is configured with."""

import copy

import pytest
from transformers import LlamaConfig

from internlm_mm.checkpoint.remote_code.configuration_internlm2 import InternLM2Config
from internlm_mm.models.hf_layouts import from_internlm2_config, to_internlm2_config
from tests.test_models.test_hf_layouts import ROPES, llama


@pytest.mark.parametrize('rope', ROPES, ids=lambda rope: rope['rope_type'])
@pytest.mark.parametrize('bias', [True, False])
def test_is_the_llama_of_the_same_words(rope, bias):
    said = llama(rope_parameters=rope, attention_bias=bias, num_key_value_heads=2)
    config = InternLM2Config(**to_internlm2_config(said))
    wanted = LlamaConfig(**copy.deepcopy(said))
    assert config.attention_bias is bias and config.bias is bias
    assert config.rope_parameters == wanted.rope_parameters
    for key in ('num_key_value_heads', 'head_dim', 'rms_norm_eps', 'max_position_embeddings'):
        assert getattr(config, key) == getattr(wanted, key)


@pytest.mark.parametrize('rope', ROPES, ids=lambda rope: rope['rope_type'])
def test_what_is_saved_is_read_again(tmp_path, rope):
    said = to_internlm2_config(llama(rope_parameters=rope, num_key_value_heads=2))
    config = InternLM2Config(**said)
    config.save_pretrained(tmp_path)
    saved = InternLM2Config.get_config_dict(tmp_path)[0]
    for key in said.keys() - {'dtype', 'torch_dtype', 'architectures'}:
        assert saved[key] == said[key], key
    assert not {'attention_bias', 'rope_parameters', 'head_dim'} & set(saved)
    again = InternLM2Config.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert from_internlm2_config(saved)['rope_parameters'] == config.rope_parameters


def test_as_internlm2_chat_7b_says_it():
    config = InternLM2Config(
        bias=False, rope_theta=1000000, rope_scaling={'type': 'dynamic', 'factor': 2.0}
    )
    wanted = {'rope_type': 'dynamic', 'rope_theta': 1000000, 'factor': 2.0}
    assert config.rope_parameters == wanted
    config.bias = True
    assert config.attention_bias is True
