"""Folders that plain transformers must load, and damaged ones that must be refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from internlm_mm.checkpoint.huggingface import (
    check_vocabulary,
    export_hf,
    fill_model,
    import_hf,
    verify_logits,
)
from internlm_mm.models import InternLM, Llama
from internlm_mm.models.hf_forms import LLAMA
from internlm_mm.registry import MODELS
from internlm_mm.utils.weight_layout import WeightLayout

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


def build(family=InternLM, **changes):
    with torch.device('meta'):
        return family(**(SIZES | changes))


@pytest.fixture
def state():
    """Weights of a size that makes every part of the model matter."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(parameter.shape, generator=generator) * 0.3
        for name, parameter in build().named_parameters()
    }


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_transformers_loads_what_we_write(tmp_path, state, dtype):
    out = tmp_path / 'out'
    difference = export_hf(build(), state, out, dtype=dtype, max_shard_bytes=20_000)
    assert 0 <= difference < 1e-4
    assert len(list(out.glob('*.safetensors'))) > 2
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(model) is LlamaForCausalLM
    assert not info['missing_keys'] and not info['unexpected_keys']
    assert model.dtype == getattr(torch, dtype)
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.attention_bias and not model.config.mlp_bias
    assert model.config.rope_parameters['rope_theta'] == 5000.0
    for name, tensor in state.items():
        stored = model.state_dict()['lm_head.weight' if 'lm_head' in name else f'model.{name}']
        torch.testing.assert_close(stored, tensor.to(stored.dtype), rtol=0, atol=0)


def test_files_are_what_the_index_says(tmp_path, state):
    out = tmp_path / 'out'
    export_hf(build(), state, out, dtype='float32', max_shard_bytes=20_000, verify=False)
    index = json.loads((out / 'model.safetensors.index.json').read_text())
    for file in set(index['weight_map'].values()):
        names = {name for name, place in index['weight_map'].items() if place == file}
        assert set(load_file(out / file)) == names
    assert index['metadata']['total_size'] == sum(4 * t.numel() for t in state.values())
    assert not (tmp_path / 'out.tmp').exists()


def test_one_tensor_is_read_at_a_time(tmp_path, state):
    class Counting(dict):
        reads = 0

        def __getitem__(self, name):
            Counting.reads += 1
            return super().__getitem__(name)

    export_hf(build(), Counting(state), tmp_path / 'out', verify=False)
    assert Counting.reads == len(state)


@pytest.mark.parametrize('family', [InternLM, Llama])
def test_import_of_an_export(tmp_path, family):
    torch.manual_seed(0)
    extra = {} if family is InternLM else dict(num_kv_heads=2, head_dim=16)
    model = build(family, **extra)
    state = {n: torch.randn(p.shape) * 0.3 for n, p in model.named_parameters()}
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


def test_a_difference_is_refused_and_leaves_nothing(tmp_path, state, monkeypatch):
    wrong = replace(LLAMA, from_llama=lambda llama: llama | {'rms_norm_eps': 1e-2})
    monkeypatch.setattr(InternLM, 'hf_forms', (wrong,))
    with pytest.raises(ValueError, match='differ from ours'):
        export_hf(build(), state, tmp_path / 'out')
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_overwritten(tmp_path, state):
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'mine').write_text('x')
    for overwrite, message in ((False, '--overwrite'), (True, "holds 'mine' and no weights")):
        with pytest.raises(FileExistsError, match=message):
            export_hf(build(), state, out, verify=False, overwrite=overwrite)
    assert (out / 'mine').exists()
    (out / 'model.safetensors').write_text('of an export before')
    export_hf(build(), state, out, verify=False, overwrite=True)
    assert not (out / 'mine').exists()
    assert [path.name for path in tmp_path.iterdir()] == ['out']


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda s: s.pop('norm.weight'), "the first is 'norm.weight'"),
        (lambda s: s.update(extra=torch.ones(1)), "the first is 'extra'"),
        (lambda s: s.update({'norm.weight': torch.ones(7)}), r'norm.weight has shape \[7\]'),
    ],
)
def test_weights_of_another_model(tmp_path, state, change, message):
    change(state)
    with pytest.raises(ValueError, match=message):
        export_hf(build(), state, tmp_path / 'out')
    assert list(tmp_path.iterdir()) == []


def test_unknown_dtype(tmp_path, state):
    with pytest.raises(ValueError, match=r"dtype='bfloat61'.*'bfloat16'"):
        export_hf(build(), state, tmp_path / 'out', dtype='bfloat61')


@pytest.mark.parametrize(('tokens', 'fits'), [(128, True), (120, True), (129, False), (4, True)])
def test_vocabulary(tokens, fits):
    class Tokenizer:
        vocab_size = tokens

    if fits:
        check_vocabulary(Tokenizer(), 128)
    else:
        with pytest.raises(ValueError, match='vocab_size=129 and the model vocab_size=128'):
            check_vocabulary(Tokenizer(), 128)
    with pytest.raises(ValueError, match='do not belong together'):
        check_vocabulary(Tokenizer(), 103_168)


def test_no_model_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'config\.json is missing'):
        import_hf(tmp_path)
    (tmp_path / 'config.json').write_text(json.dumps(LLAMA.config_of(build())))
    with pytest.raises(FileNotFoundError, match=r'holds no weights: none of model\.safetensors'):
        import_hf(tmp_path)
    (tmp_path / 'pytorch_model.bin').write_bytes(b'')
    with pytest.raises(ValueError, match=r'pytorch_model\.bin is truncated'):
        import_hf(tmp_path)


def test_a_missing_shard(tmp_path, state):
    export_hf(build(), state, tmp_path / 'out', max_shard_bytes=20_000, verify=False)
    next((tmp_path / 'out').glob('model-00002*')).unlink()
    with pytest.raises(FileNotFoundError, match='model-00002'):
        import_hf(tmp_path / 'out')


def test_a_model_we_do_not_have(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps({'architectures': ['GPT2LMHeadModel']}))
    with pytest.raises(ValueError, match=r"\['GPT2LMHeadModel'\]: no model .*Qwen3.* \(qwen3\)"):
        import_hf(tmp_path)


def test_stored_rotary_frequencies_are_ignored(tmp_path, state):
    export_hf(build(), state, tmp_path / 'out', dtype='float32', verify=False)
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
        model = build(Plugin)
        state = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
        export_hf(model, state, tmp_path / 'out', dtype='float32', verify=False)
        config, weights = import_hf(tmp_path / 'out')
    finally:
        MODELS.module_dict.pop('Plugin')
    assert config['type'] is Plugin
    assert all(torch.equal(weights[name], tensor) for name, tensor in state.items())
    stored = load_file(tmp_path / 'out' / 'model.safetensors')
    assert {name.split('.')[0] for name in stored} == {'wte', 'h', 'ln', 'out'}
