"""Folders that plain transformers must load, and what is refused before one is there."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from internlm_mm.checkpoint.huggingface import check_vocabulary, export_hf
from internlm_mm.models import InternLM
from internlm_mm.models.hf_forms import LLAMA

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
