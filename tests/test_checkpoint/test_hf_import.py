"""Folders of ours and of transformers come in, and damaged or foreign ones are refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from internlm_mm.checkpoint.hf_import import fill_model, import_hf
from internlm_mm.checkpoint.huggingface import export_hf, verify_logits
from internlm_mm.models import InternLM, Llama
from internlm_mm.models.hf_forms import LLAMA
from internlm_mm.registry import MODELS
from internlm_mm.utils.weight_layout import WeightLayout
from tests.forms import weights_of

SIZES = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    max_seq_len=64,
    norm_eps=1e-5,
    rope_theta=5000.0,
)


def family_of(family, **changes):
    with torch.device('meta'):
        return family(**(SIZES | changes))


@pytest.mark.parametrize('family', [InternLM, Llama])
def test_import_of_an_export(tmp_path, family):
    extra = {} if family is InternLM else dict(num_kv_heads=2, head_dim=16)
    model = family_of(family, **extra)
    state = weights_of(model)
    export_hf(model, state, tmp_path / 'out', dtype='float32', max_shard_bytes=30_000)
    config, weights = import_hf(tmp_path / 'out')
    assert config == {'type': family, **SIZES, **extra}
    with torch.device('meta'):
        again = MODELS.build(config)
    fill_model(again, weights, 'cpu', torch.float32)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, state[name])


def test_import_of_what_transformers_writes(tmp_path):
    hf = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    hf.save_pretrained(tmp_path)
    config, weights = import_hf(tmp_path)
    with torch.device('meta'):
        model = MODELS.build(config)
    fill_model(model, weights, 'cpu', torch.float32)
    assert verify_logits(model, tmp_path, [[1, 2, 3, 4], list(range(50))]) < 1e-5


def test_no_model_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'config\.json is missing'):
        import_hf(tmp_path)
    (tmp_path / 'config.json').write_text(json.dumps(LLAMA.config_of(family_of(InternLM))))
    with pytest.raises(FileNotFoundError, match=r'holds no weights: none of model\.safetensors'):
        import_hf(tmp_path)
    (tmp_path / 'pytorch_model.bin').write_bytes(b'')
    with pytest.raises(ValueError, match=r'pytorch_model\.bin is truncated'):
        import_hf(tmp_path)


def test_a_missing_shard(tmp_path):
    model = family_of(InternLM)
    export_hf(model, weights_of(model), tmp_path / 'out', max_shard_bytes=20_000, verify=False)
    next((tmp_path / 'out').glob('model-00002*')).unlink()
    with pytest.raises(FileNotFoundError, match='model-00002'):
        import_hf(tmp_path / 'out')


def test_a_model_we_do_not_have(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps({'architectures': ['GPT2LMHeadModel']}))
    with pytest.raises(ValueError, match=r"\['GPT2LMHeadModel'\]: no model .*Qwen3.* \(qwen3\)"):
        import_hf(tmp_path)


def test_stored_rotary_frequencies_are_ignored(tmp_path):
    model = family_of(InternLM)
    state = weights_of(model)
    export_hf(model, state, tmp_path / 'out', dtype='float32', verify=False)
    file = tmp_path / 'out' / 'model.safetensors'
    tensors = load_file(file) | {'model.layers.0.self_attn.rotary_emb.inv_freq': torch.ones(4)}
    save_file(tensors, file, metadata={'format': 'pt'})
    (tmp_path / 'out' / 'model.safetensors.index.json').unlink()
    _, weights = import_hf(tmp_path / 'out')
    assert set(weights) == set(state)


def test_a_form_of_a_plugin_s_own(tmp_path):
    """A family is found by its form, and weights have the names that it says."""
    names = {'embed_tokens.': 'wte.', 'layers.': 'h.', 'norm.': 'ln.', 'lm_head.': 'out.'}

    class Plugin(Llama):
        hf_forms = (
            replace(
                LLAMA,
                name='plugin',
                model_type='plugin',
                architecture='PluginForCausalLM',
                layout=lambda heads, kv_heads: WeightLayout.of_names(names),
            ),
        )

    MODELS.register_module(module=Plugin)
    try:
        model = family_of(Plugin)
        state = weights_of(model)
        export_hf(model, state, tmp_path / 'out', dtype='float32', verify=False)
        config, weights = import_hf(tmp_path / 'out')
    finally:
        MODELS.module_dict.pop('Plugin')
    assert config['type'] is Plugin
    assert all(torch.equal(weights[name], tensor) for name, tensor in state.items())
    stored = load_file(tmp_path / 'out' / 'model.safetensors')
    assert {name.split('.')[0] for name in stored} == {'wte', 'h', 'ln', 'out'}
