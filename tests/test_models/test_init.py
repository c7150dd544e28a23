"""What each parameter is drawn from."""

import math

import pytest
import torch

from internlm_mm.models import InternLM
from internlm_mm.models.init import NormalInit

RULE = NormalInit(embedding=0.5, projection=0.1, scale_by_depth=True)


def filled(name, shape, rule=RULE, seed=0):
    tensor = torch.full(shape, float('nan'))
    rule.fill(name, tensor, torch.Generator().manual_seed(seed))
    return tensor


@pytest.mark.parametrize(
    ('name', 'std'),
    [
        ('embed_tokens.weight', 0.5),
        ('lm_head.weight', 0.5),
        ('layers.3.self_attn.q_proj.weight', 0.1),
        ('layers.3.mlp.gate_proj.weight', 0.1),
        ('layers.3.mlp.up_proj.weight', 0.1),
        ('layers.0.mlp.down_proj.weight', 0.1 / math.sqrt(2)),
        ('layers.3.mlp.down_proj.weight', 0.1 / math.sqrt(8)),
        ('layers.17.self_attn.o_proj.weight', 0.1 / 6),
    ],
)
def test_standard_deviations(name, std):
    tensor = filled(name, (300, 300))
    # 90,000 draws: the sample's deviation is within 1 % of the true one, four times over.
    assert abs(tensor.std() / std - 1) < 0.01
    assert abs(tensor.mean()) < std * 0.014


def test_flat_where_depth_does_not_count():
    flat = RULE._replace(scale_by_depth=False)
    assert abs(filled('layers.9.mlp.down_proj.weight', (300, 300), flat).std() / 0.1 - 1) < 0.01


def test_constants():
    assert filled('layers.0.self_attn.o_proj.bias', (8,)).tolist() == [0] * 8
    for name in ('norm.weight', 'layers.0.input_layernorm.weight'):
        assert filled(name, (8,)).tolist() == [1] * 8


def test_the_generator_alone_decides():
    name = 'embed_tokens.weight'
    torch.manual_seed(5)
    first = filled(name, (4, 4))
    torch.manual_seed(6)
    assert torch.equal(first, filled(name, (4, 4)))
    assert not torch.equal(first, filled(name, (4, 4), seed=1))


def test_a_parameter_no_rule_covers():
    with pytest.raises(ValueError, match=r"'layers.0.gate' of shape \[3\]"):
        filled('layers.0.gate', (3,))


def test_every_parameter_of_a_model_is_filled_under_inference_rules():
    model = InternLM(vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2)
    for name, parameter in model.named_parameters():
        parameter.data.fill_(float('nan'))
        model.init_parameter(name, parameter, torch.Generator().manual_seed(0))
        assert not parameter.isnan().any()
