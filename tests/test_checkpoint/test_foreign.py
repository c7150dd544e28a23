"""Telling what a folder holds, and refusing it with the tensor or file and what was expected."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from internlm_mm.checkpoint.foreign import (
    check_same_model,
    is_foreign,
    open_source,
)
from internlm_mm.checkpoint.huggingface import export_hf
from internlm_mm.models import InternLM, Llama
from tests.internlm_oracle import SIZES, full_state, write_shards
from tests.trained import trained_run


def write_hf(folder, **changes):
    """A Hugging Face folder of an InternLM, and its weights by our names."""
    state = full_state(SIZES, biases=True)
    with torch.device('meta'):
        model = InternLM(**SIZES)
    export_hf(model, state, folder, dtype='float32', verify=False)
    if changes:
        edit_config(folder, **changes)
    return state


def edit_config(folder, **changes):
    config = json.loads((folder / 'config.json').read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / 'config.json').write_text(json.dumps(config))


def edit_weights(folder, edit):
    state = load_file(folder / 'model.safetensors')
    edit(state)
    (folder / 'model.safetensors.index.json').unlink(missing_ok=True)
    save_file(state, folder / 'model.safetensors')


@pytest.fixture
def hf(tmp_path):
    write_hf(tmp_path / 'hf')
    return tmp_path / 'hf'


def test_a_hugging_face_folder(tmp_path):
    state = write_hf(tmp_path / 'hf')
    source = open_source(tmp_path / 'hf')
    assert source.form == 'a Hugging Face folder' and source.family == 'InternLM'
    assert source.config == {'type': InternLM, **SIZES}
    assert all(torch.equal(source.weights[name], tensor) for name, tensor in state.items())
    longer = open_source(tmp_path / 'hf', 'hf', {'max_seq_len': 8192})
    assert longer.config == {'type': InternLM, **SIZES, 'max_seq_len': 8192}
    assert is_foreign(tmp_path / 'hf')


def test_shards(tmp_path):
    state = full_state(SIZES, biases=True)
    write_shards(tmp_path / 'x', state, SIZES, tp=2, pp=2, config={})
    for format in ('auto', 'internlm-2023'):
        source = open_source(tmp_path / 'x', format)
        assert source.form == "InternLM's own shards" and source.family == 'InternLM'
        assert torch.equal(source.weights['norm.weight'], state['norm.weight'])
    assert is_foreign(tmp_path / 'x')


def test_both_in_one_folder(tmp_path, hf):
    write_shards(tmp_path / 'x', full_state(SIZES, True), SIZES, config={})
    for file in (tmp_path / 'x').iterdir():
        file.rename(hf / file.name)
    with pytest.raises(ValueError, match='tell which with --format'):
        open_source(hf)
    assert open_source(hf, 'hf').form == 'a Hugging Face folder'
    assert open_source(hf, 'internlm-2023').form == "InternLM's own shards"


def test_checkpoints_of_ours(tmp_path):
    work_dir, _, _ = trained_run(tmp_path)
    for path in (work_dir, work_dir / 'iter_3'):
        assert not is_foreign(path)
        with pytest.raises(ValueError, match='is a checkpoint of internlm_mm already'):
            open_source(path)


@pytest.mark.parametrize(
    ('file', 'error', 'message'),
    [
        (None, FileNotFoundError, 'no folder.*nothing is downloaded'),
        ('', FileNotFoundError, r'holds no model_tp\*_pp\*\.pt'),
        ('x.gguf', ValueError, 'holds GGUF files'),
        ('consolidated.00.pth', ValueError, "is in Meta's format"),
        ('model.safetensors', FileNotFoundError, r'config\.json is missing'),
        ('config.json', ValueError, r'config\.json is truncated or damaged'),
    ],
)
def test_folders_of_something_else(tmp_path, file, error, message):
    folder = tmp_path / 'x'
    if file is not None:
        folder.mkdir()
        (folder / file).touch() if file else None
    with pytest.raises(error, match=message):
        open_source(folder)


def test_unknown_format(hf):
    with pytest.raises(ValueError, match=r"'internlm2023' is unknown\. Did you mean 'internlm-20"):
        open_source(hf, 'internlm2023')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'architectures': ['LlamaForCasualLM']}, 'LlamaForCasualLM'),
        ({'num_attention_heads': ...}, r"config\.json: the key 'num_attention_heads' is missing"),
        ({'num_hidden_layers': 3}, r"'layers\.3\.input_layernorm\.weight' is left over"),
        ({'num_hidden_layers': 5}, r"'layers\.4\..*' is missing, which InternLM has"),
        ({'intermediate_size': 47}, r'gate_proj.*shape \[48, 32\]; expected \[47, 32\]'),
        ({'vocab_size': 100}, r'embed_tokens.*shape \[96, 32\]; expected \[100, 32\]'),
    ],
)
def test_configs_that_do_not_fit(tmp_path, changes, message):
    write_hf(tmp_path / 'hf', **changes)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / 'hf')


@pytest.mark.parametrize(
    ('edit', 'message'),
    [
        (lambda s: s.pop('model.norm.weight'), r"'norm\.weight' is missing, which InternLM has"),
        (
            lambda s: s.update({'model.layers.1.mlp.gate_proj.bias': torch.ones(48)}),
            r"'layers\.1\.mlp\.gate_proj\.bias' is left over \(of 1\)",
        ),
        (lambda s: s.update({'model.norm.weight': torch.ones(31)}), r'\[31\]; expected \[32\]'),
        (
            lambda s: s.update({'score.weight': torch.ones(31)}),
            r"model\.safetensors: weight 'score\.weight' is unknown",
        ),
    ],
)
def test_weights_that_do_not_fit(hf, edit, message):
    edit_weights(hf, edit)
    with pytest.raises(ValueError, match=message):
        open_source(hf)


def test_a_truncated_file(hf):
    whole = (hf / 'model.safetensors').read_bytes()
    (hf / 'model.safetensors').write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=r'model\.safetensors is truncated or damaged'):
        open_source(hf)


def test_a_setting_that_is_none(hf):
    with pytest.raises(ValueError, match=r"no setting of InternLM\. Did you mean 'max_seq_len'"):
        open_source(hf, settings={'max_seqlen': 1})


def test_the_same_model(hf):
    with torch.device('meta'):
        assert check_same_model(InternLM(**SIZES), open_source(hf)) == []
        longer = check_same_model(InternLM(**SIZES | {'max_seq_len': 4096}), open_source(hf))
    assert longer == [f'model.max_seq_len=4096 differs from 2048 in {hf}']


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'num_layers': 2}, 'model.num_layers=2, but .*hf is a InternLM with num_layers=4'),
        ({'num_heads': 8}, 'model.num_heads=8, but .* with num_heads=4'),
        ({'norm_eps': 1e-6}, 'model.norm_eps=1e-06, but .* with norm_eps=1e-05'),
        ({'rope_theta': 1e6}, 'model.rope_theta=1000000.0, but .* with rope_theta=10000.0'),
        ({'vocab_size': 128}, 'model.vocab_size=128, but'),
    ],
)
def test_another_model(hf, changes, message):
    with torch.device('meta'):
        model = InternLM(**SIZES | changes)
    with pytest.raises(ValueError, match=message):
        check_same_model(model, open_source(hf))


def test_another_family(hf):
    with torch.device('meta'):
        model = Llama(**SIZES)
    with pytest.raises(ValueError, match=r"'layers\.0\.self_attn\..*bias' is left over"):
        check_same_model(model, open_source(hf))
