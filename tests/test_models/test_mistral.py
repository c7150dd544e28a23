"""Mistral against transformers' own class."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from internlm_mm.models import Mistral
from tests.test_models.helpers import SIZES
from tests.test_models.parity import THEIRS, assert_decodes, assert_same, fill


@pytest.mark.parametrize('tied', [False, True])
def test_logits_and_every_gradient(tied):
    ours = Mistral(**SIZES, num_kv_heads=2, head_dim=16, tie_word_embeddings=tied)
    config = MistralConfig(
        **THEIRS,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=None,
        tie_word_embeddings=tied,
        rope_parameters={'rope_type': 'default', 'rope_theta': 1_000_000.0},
    )
    theirs = MistralForCausalLM(config)
    fill(ours, theirs)
    assert_same(ours, theirs)
    assert_decodes(ours)


def test_no_biases():
    with torch.device('meta'):
        names = [name for name, _ in Mistral(**SIZES).named_parameters()]
    assert not [name for name in names if name.endswith('bias')]
