"""Qwen2 against transformers' own class."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from internlm_mm.models import Qwen2
from tests.test_models.helpers import SIZES
from tests.test_models.parity import THEIRS, assert_decodes, assert_same, fill

YARN = dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=16)
PLAIN = dict(rope_type='default')


@pytest.mark.parametrize('rope', [PLAIN, YARN], ids=['plain', 'yarn'])
@pytest.mark.parametrize('tied', [False, True], ids=['apart', 'tied'])
def test_logits_and_every_gradient(tied, rope):
    options = dict(tie_word_embeddings=tied)
    ours = Qwen2(**SIZES, num_kv_heads=2, rope_scaling=rope, **options)
    config = Qwen2Config(
        **(THEIRS | {'rms_norm_eps': 1e-6}),
        num_key_value_heads=2,
        rope_parameters={'rope_theta': 1_000_000.0, **rope},
        **options,
    )
    theirs = Qwen2ForCausalLM(config)
    fill(ours, theirs)
    assert_same(ours, theirs)
    assert_decodes(ours)


def test_biases_on_queries_keys_and_values():
    with torch.device('meta'):
        model = Qwen2(**SIZES)
    biases = [name for name, _ in model.named_parameters() if name.endswith('bias')]
    assert biases == [f'layers.{i}.self_attn.{x}_proj.bias' for i in range(3) for x in 'qkv']
    assert (model.attention_bias, model.output_bias) == (True, False)
