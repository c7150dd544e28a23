"""What families share: sizes that are refused, options that do something, forms of their own."""

import inspect

import pytest
import torch

from internlm_mm.models import (
    Family,
    InternLM,
    InternLM2,
    InternLM3,
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
)
from internlm_mm.models.hf_forms import (
    INTERNLM,
    INTERNLM2,
    INTERNLM3,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
)
from internlm_mm.registry import MODELS
from tests import forms
from tests.test_models.helpers import SIZES

FORMS = {
    InternLM: (LLAMA, INTERNLM),
    InternLM2: (LLAMA, INTERNLM2),
    InternLM3: (LLAMA, INTERNLM3),
    Llama: (LLAMA,),
    Mistral: (MISTRAL, LLAMA),
    Qwen2: (QWEN2,),
    Qwen3: (QWEN3,),
}
by_name = pytest.mark.parametrize('family', FORMS, ids=lambda family: family.__name__)


def biases_of(model) -> set[str]:
    names = [name.split('.') for name, _ in model.named_parameters() if name.endswith('.bias')]
    return {module for *_, module, _ in names}


@by_name
def test_registered_with_forms(family) -> None:
    assert MODELS.get(family.__name__) is family
    assert issubclass(family, Family)
    assert family.hf_forms == FORMS[family]


@by_name
def test_what_it_says_of_itself_is_so(family) -> None:
    model = family(**SIZES)
    expected = set()
    if model.attention_bias:
        expected |= {'q_proj', 'k_proj', 'v_proj'}
    if model.output_bias:
        expected |= {'o_proj'}
    assert biases_of(model) == expected
    assert (model.layers['0'].self_attn.q_norm is not None) == model.qk_norm
    assert family.attention_bias == model.attention_bias
    assert family.qk_norm == model.qk_norm


@by_name
def test_every_option_reaches_the_model(family) -> None:
    said = dict(
        num_kv_heads=2,
        head_dim=6,
        rope_theta=77.0,
        rope_scaling=dict(rope_type='linear', factor=2.0),
        norm_eps=0.25,
        tie_word_embeddings=True,
        attention_bias=not family.attention_bias,
    )
    taken = inspect.signature(family).parameters
    said = {key: value for key, value in said.items() if key in taken}
    with torch.device('meta'):
        model = family(**SIZES, **said)
    for key, value in {**SIZES, **said}.items():
        found = len(model.layers) if key == 'num_layers' else getattr(model, key)
        assert found == value, key
    assert model.norm.eps == model.layers['0'].input_layernorm.eps == 0.25
    if 'attention_bias' in said:
        assert biases_of(model) == (
            {'q_proj', 'k_proj', 'v_proj', 'o_proj'} if said['attention_bias'] else set()
        )
    attention = model.layers['0'].self_attn
    assert attention.k_proj.out_features == model.num_kv_heads * model.head_dim
    assert attention.o_proj.in_features == model.num_heads * model.head_dim


@by_name
def test_sizes_that_do_not_fit(family) -> None:
    taken = inspect.signature(family).parameters
    cases = [
        (dict(num_heads=5), 'num_heads=5 does not divide hidden_size=32'),
        (dict(num_heads=0), 'num_heads=0 must be a positive integer'),
        (dict(num_kv_heads=3), 'num_kv_heads=3 does not divide num_heads=4'),
        (dict(num_kv_heads=0), 'num_kv_heads=0 must be a positive integer'),
        (dict(head_dim=5), 'head_dim=5 is odd'),
        (dict(rope_scaling=dict(rope_type='liner', factor=2.0)), "'liner' is unknown"),
    ]
    for changes, message in cases:
        if set(changes) <= set(taken):
            with pytest.raises(ValueError, match=message):
                family(**(SIZES | changes))


@by_name
def test_a_scaling_is_not_shared_with_the_config(family) -> None:
    said = dict(rope_type='linear', factor=2.0)
    with torch.device('meta'):
        model = family(**SIZES, rope_scaling=said)
    said['factor'] = 3.0
    assert model.rope_scaling == dict(rope_type='linear', factor=2.0)


def test_every_family_takes_part_in_the_round_trips():
    MODELS.import_from_location()
    ours = {
        kind
        for kind in MODELS.module_dict.values()
        if isinstance(kind, type)
        and issubclass(kind, Family)
        and kind.__module__.startswith('internlm_mm.')
    }
    assert {family for family, _ in forms.FAMILIES.values()} == ours
