"""Forms of Hugging Face folders against transformers' own configurations and parameters."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from internlm_mm.checkpoint.remote import FORMATS, model_class
from internlm_mm.models import InternLM, InternLM2, InternLM3, Llama, Mistral, Qwen2, Qwen3
from internlm_mm.models.hf_forms import (
    INTERNLM,
    INTERNLM2,
    INTERNLM3,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    arguments_of,
    llama_config,
)
from tests.forms import CASES, LLAMA3, SIZES, YARN, build, form_of

SAID = {
    'hidden_size': 32,
    'intermediate_size': 48,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
}
OWN = [(Llama, LLAMA), (Mistral, MISTRAL), (Qwen2, QWEN2), (Qwen3, QWEN3), (InternLM3, INTERNLM3)]


def theirs_of(config):
    """The configuration of transformers, and its model on the meta device."""
    said = dict(config)
    with torch.device('meta'):
        if said['model_type'] in FORMATS:
            config_class, model_type = model_class(said)
            read = config_class.from_dict(said)
            return read, model_type(read)
        read = AutoConfig.for_model(**said)
        return read, AutoModelForCausalLM.from_config(read)


@pytest.mark.parametrize(('name', 'form'), CASES)
def test_a_config_comes_back(name, form):
    ours, form = build(name), form_of(name, form)
    config = form.config_of(ours)
    again = form.arguments(type(ours), config)
    with torch.device('meta'):
        assert llama_config(type(ours)(**again)) == llama_config(ours)


@pytest.mark.parametrize(('name', 'form'), CASES)
def test_transformers_means_the_same(name, form):
    """Its configuration, written by itself, is the same model to us; parameters have its names."""
    ours, form = build(name), form_of(name, form)
    theirs, model = theirs_of(form.config_of(ours))
    said = theirs.to_dict() | {'architectures': [type(model).__name__]}
    assert form.describes(said)
    with torch.device('meta'):
        assert llama_config(type(ours)(**form.arguments(type(ours), said))) == llama_config(ours)
    layout = form.layout(ours.num_heads, ours.num_kv_heads)
    stored = layout.groups(name for name, _ in ours.named_parameters())
    shapes = {name: p for name, p in ours.named_parameters()}
    wanted = {name: p.shape for name, p in model.named_parameters()}
    assert set(stored) == set(wanted)
    for name, parts in stored.items():
        packing = layout.packing(name)
        tensors = [shapes[part] for part in parts]
        assert wanted[name] == (tensors[0] if packing is None else packing.join(tensors)).shape


@pytest.mark.parametrize(('family', 'form'), OWN, ids=lambda x: getattr(x, 'name', ''))
def test_what_is_not_said(family, form):
    """Keys that a config.json leaves out are what transformers takes for them."""
    said = SAID | {'model_type': form.model_type}
    whole = AutoConfig.for_model(**said).to_dict()
    if form is MISTRAL:
        for config in (said, whole):
            with pytest.raises(ValueError, match='sliding_window=4096: only None is done here'):
                form.arguments(family, config)
        said, whole = said | {'sliding_window': None}, whole | {'sliding_window': None}
    ours = form.arguments(family, said)
    assert ours == form.arguments(family, whole)
    assert ours['vocab_size'] == whole['vocab_size']
    assert ours['max_seq_len'] == whole['max_position_embeddings']
    assert ours['norm_eps'] == whole['rms_norm_eps']
    assert ours['num_kv_heads'] == whole['num_key_value_heads']


def test_defaults_of_internlms_own():
    first = INTERNLM.arguments(InternLM, SAID | {'model_type': 'internlm'})
    assert (first['vocab_size'], first['norm_eps'], first['max_seq_len']) == (103_168, 1e-6, 2048)
    assert first['rope_theta'] == 10_000.0 and 'attention_bias' not in first
    second = INTERNLM2.arguments(InternLM2, SAID | {'model_type': 'internlm2'})
    assert (second['vocab_size'], second['num_kv_heads']) == (103_168, 4)
    assert second['attention_bias'] is True


def test_rope_of_before_transformers_5():
    said = SAID | {'model_type': 'llama', 'rope_theta': 5e5, 'max_position_embeddings': 256}
    plain = LLAMA.arguments(Llama, said)
    assert plain['rope_theta'] == 5e5 and 'rope_scaling' not in plain
    for word in ('type', 'rope_type'):
        scaled = LLAMA.arguments(Llama, said | {'rope_scaling': {word: 'linear', 'factor': 2.0}})
        assert scaled['rope_scaling'] == {'rope_type': 'linear', 'factor': 2.0}
    yarn = LLAMA.arguments(Llama, said | {'rope_scaling': {'type': 'yarn', 'factor': 2.0}})
    assert yarn['rope_scaling']['original_max_position_embeddings'] == 256
    new = {'rope_parameters': {**LLAMA3, 'rope_theta': 1e6}}
    assert LLAMA.arguments(Llama, said | new)['rope_theta'] == 1e6
    assert LLAMA.arguments(Llama, said | new)['rope_scaling'] == LLAMA3


def test_both_spellings_are_written():
    for scaling in (LLAMA3, YARN):
        config = QWEN3.config_of(build('Qwen3', rope_scaling=scaling))
        assert config['rope_scaling'] == scaling and config['rope_theta'] == 5000.0
        assert config['rope_parameters'] == {**scaling, 'rope_theta': 5000.0}
    assert 'rope_scaling' not in LLAMA.config_of(build('InternLM'))


@pytest.mark.parametrize(
    ('form', 'config', 'whether'),
    [
        (INTERNLM2, {'model_type': 'internlm', 'architectures': ['InternLM2ForCausalLM']}, True),
        (INTERNLM, {'model_type': 'internlm', 'architectures': ['InternLM2ForCausalLM']}, False),
        (INTERNLM, {'model_type': 'internlm'}, True),
        (INTERNLM3, {'model_type': 'internlm3', 'architectures': ['LlamaForCausalLM']}, True),
        (LLAMA, {'model_type': 'internlm3', 'architectures': ['LlamaForCausalLM']}, False),
        (LLAMA, {'architectures': ['LlamaForCausalLM']}, True),
        (LLAMA, {'model_type': 'llama', 'architectures': ['LlamaModel']}, False),
        (LLAMA, {'model_type': 'mllama', 'architectures': ['LlamaForCausalLM']}, False),
        (QWEN2, {'model_type': 'qwen2', 'architectures': ['Qwen2ForRewardModel']}, False),
        (LLAMA, {'model_type': 'llama', 'architectures': 5}, True),
        (LLAMA, {}, False),
    ],
)
def test_whose_config_it_is(form, config, whether):
    assert form.describes(config) is whether


@pytest.mark.parametrize(
    ('family', 'form', 'changes', 'message'),
    [
        (InternLM, LLAMA, {'num_key_value_heads': 2}, 'InternLM has num_kv_heads=4, not 2'),
        (InternLM, LLAMA, {'head_dim': 16}, 'InternLM has head_dim=8'),
        (InternLM, LLAMA, {'tie_word_embeddings': True}, 'tie_word_embeddings=False, not True'),
        (Mistral, LLAMA, {'attention_bias': True}, 'Mistral has attention_bias=False, not True'),
        (Llama, LLAMA, {'mlp_bias': True}, 'mlp_bias=True: only False is done here'),
        (Llama, LLAMA, {'hidden_act': 'gelu'}, "hidden_act='gelu': only 'silu' is done here"),
        (Llama, LLAMA, {'hidden_size': None}, 'hidden_size=None must be a positive integer'),
        (Llama, LLAMA, {'num_attention_heads': '4'}, "num_attention_heads='4' must be a positive"),
        (Llama, LLAMA, {'num_key_value_heads': 0}, 'num_key_value_heads=0 must be a positive int'),
        (Llama, LLAMA, {'head_dim': '8'}, "head_dim='8' must be a positive integer"),
        (Llama, LLAMA, {'max_position_embeddings': None}, 'max_position_embeddings=None must be'),
        (Llama, LLAMA, {'rms_norm_eps': None}, 'rms_norm_eps=None must be a positive number'),
        (Llama, LLAMA, {'rms_norm_eps': '1e-5'}, "rms_norm_eps='1e-5' must be a positive number"),
        (Llama, LLAMA, {'rope_parameters': {'rope_theta': 'x'}}, "rope_theta='x' must be a pos"),
        (Llama, LLAMA, {'rope_parameters': {'rope_type': ['x']}}, r"rope_type=\['x'\] must be"),
        (Llama, LLAMA, {'num_hidden_layers': ...}, "the key 'num_hidden_layers' is missing"),
        (Llama, LLAMA, {'quantization_config': {'bits': 4}}, 'quantization_config'),
        (Llama, LLAMA, {'rope_scaling': {'type': 'longrope'}}, "rope_type='longrope'"),
        (Llama, LLAMA, {'rope_scaling': 'linear'}, "rope_scaling='linear' must be a table"),
        (Llama, LLAMA, {'rope_parameters': {'rope_type': 'llama3'}}, 'factor'),
        (Llama, LLAMA, {'rope_parameters': {'partial_rotary_factor': 0.5}}, 'whole heads'),
        (Mistral, MISTRAL, {'sliding_window': 512}, 'sliding_window=512: only None is done here'),
        (Qwen2, QWEN2, {'use_sliding_window': True}, 'use_sliding_window=True: only False'),
        (Qwen3, QWEN3, {'use_sliding_window': True}, 'use_sliding_window=True: only False'),
        (InternLM3, INTERNLM3, {'qkv_bias': True}, 'qkv_bias=True: only False is done here'),
        (InternLM3, INTERNLM3, {'mlp_bias': True}, 'mlp_bias=True: only False is done here'),
    ],
)
def test_what_is_not_done_here(family, form, changes, message):
    with torch.device('meta'):
        config = form.config_of(family(**SIZES)) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        form.arguments(family, config)


def test_a_family_s_own_way_with_biases():
    """Qwen2's config.json has no word for its biases, and needs none."""
    config = QWEN2.config_of(build('Qwen2'))
    assert 'attention_bias' not in config and 'head_dim' not in config
    assert arguments_of(Qwen2, llama_config(build('Qwen2')))['num_heads'] == 4
