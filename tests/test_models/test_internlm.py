"""InternLM: transformers' Llama with biases; sizes, initialisation, what is refused."""

import math
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from transformers import LlamaConfig, LlamaForCausalLM

from internlm_mm.models import InternLM
from internlm_mm.registry import MODELS
from tests.test_models.helpers import SIZES
from tests.test_models.parity import THEIRS, assert_decodes, assert_same, fill

CONFIGS = Path(__file__).parents[2] / 'configs' / '_base_' / 'models'


@pytest.mark.parametrize(
    ('name', 'parameters'),
    [
        ('internlm_7b', 7_321_948_160),
        ('internlm_20b', 20_089_943_040),
        ('internlm_tiny', 3_347_136),
    ],
)
def test_parameter_counts(name, parameters):
    config = Config.fromfile(CONFIGS / f'{name}.py')
    with torch.device('meta'):
        model = MODELS.build(config.model)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('dynamic', [True, False])
def test_logits_and_every_gradient(bias, dynamic):
    scaling = dict(rope_type='dynamic', factor=1.0) if dynamic else dict(rope_type='default')
    ours = InternLM(
        **SIZES,
        attention_bias=bias,
        rope_scaling=scaling | (dict(original_max_position_embeddings=16) if dynamic else {}),
    )
    config = LlamaConfig(
        **(THEIRS | dict(max_position_embeddings=16)),
        attention_bias=bias,
        rope_parameters={'rope_theta': 10_000.0, **scaling},
    )
    theirs = LlamaForCausalLM(config)
    fill(ours, theirs)
    assert_same(ours, theirs)
    assert_decodes(ours)


def test_biases_on_attention_only():
    with torch.device('meta'):
        biases = [n for n, _ in InternLM(**SIZES).named_parameters() if n.endswith('bias')]
    assert biases == [
        f'layers.{i}.self_attn.{x}_proj.bias' for i in range(3) for x in ('q', 'k', 'v', 'o')
    ]


def test_published_20b_has_no_biases():
    config = Config.fromfile(CONFIGS / 'internlm_20b.py')
    config.model.update(vocab_size=8, num_layers=2, attention_bias=False)
    with torch.device('meta'):
        model = MODELS.build(config.model)
    assert not [name for name, _ in model.named_parameters() if name.endswith('bias')]
    assert (model.attention_bias, model.output_bias) == (False, False)


def test_initialisation():
    model = InternLM(**(SIZES | dict(vocab_size=2048, hidden_size=256, intermediate_size=512)))
    for name, parameter in model.named_parameters():
        model.init_parameter(name, parameter, torch.Generator().manual_seed(0))
    stds = {n: float(p.std()) for n, p in model.state_dict().items() if p.ndim == 2}
    expected = {
        'embed_tokens': 0.0052,
        'lm_head': 0.0052,
        'layers.2.self_attn.q_proj': 0.006,
        'layers.2.mlp.gate_proj': 0.006,
        'layers.2.mlp.up_proj': 0.006,
        'layers.0.mlp.down_proj': 0.006 / math.sqrt(2),
        'layers.2.mlp.down_proj': 0.006 / math.sqrt(6),
        'layers.2.self_attn.o_proj': 0.006 / math.sqrt(6),
    }
    for name, std in expected.items():
        assert stds[f'{name}.weight'] == pytest.approx(std, rel=0.02), name


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(num_heads=5), 'num_heads=5 does not divide hidden_size=32'),
        (dict(hidden_size=36, num_heads=12), 'head_dim=3 is odd'),
        (dict(num_heads=0), 'num_heads=0 must be a positive integer'),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        InternLM(**(SIZES | changes))
