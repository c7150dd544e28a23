"""Telling what a folder holds, and refusing it with the tensor or file and what was expected."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from internlm_mm.checkpoint.foreign import (
    check_same_model,
    is_foreign,
    open_source,
)
from internlm_mm.checkpoint.hf_files import HFWeights
from internlm_mm.checkpoint.huggingface import export_hf
from internlm_mm.checkpoint.internlm_shards import InternLMWeights
from internlm_mm.models import InternLM, InternLM2, Llama
from tests.internlm_oracle import GROUPED, SIZES, full_state, write_shards
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


@pytest.mark.parametrize('form', ['llama', 'internlm2', 'shards'])
def test_nothing_is_read_to_be_checked(tmp_path, form, monkeypatch):
    """Of a folder of 40 GB, that would take minutes on every rank."""
    if form == 'shards':
        write_shards(tmp_path / 'x', full_state(SIZES, True), SIZES, tp=2, pp=2, config={})
    elif form == 'llama':
        write_hf(tmp_path / 'x')
    else:
        with torch.device('meta'):
            model = InternLM2(**GROUPED)
        state = full_state(GROUPED, biases=False)
        export_hf(model, state, tmp_path / 'x', dtype='float32', format='internlm2', verify=False)

    def read(self, name):
        raise AssertionError(f'{name} was read')

    for kind in (HFWeights, InternLMWeights):
        monkeypatch.setattr(kind, '__getitem__', read)
    source = open_source(tmp_path / 'x')
    assert check_same_model(source.build(), source) == []


@pytest.mark.parametrize(
    ('file', 'error', 'message'),
    [
        (None, FileNotFoundError, 'no folder.*nothing is downloaded'),
        ('', FileNotFoundError, r'neither a Hugging Face model .* nor .*\(model_tp\*_pp\*\.pt\)$'),
        ('20/model_tp0_pp0.pt', FileNotFoundError, r'pt\); its folder 20 does$'),
        ('snapshots/1f/config.json', FileNotFoundError, r'; its folder snapshots/1f does$'),
        ('x.gguf', ValueError, 'holds GGUF files'),
        ('consolidated.00.pth', ValueError, "is in Meta's format"),
        ('model.safetensors', FileNotFoundError, r'config\.json is missing'),
        ('config.json', ValueError, r'config\.json is truncated or damaged'),
    ],
)
def test_folders_of_something_else(tmp_path, file, error, message):
    folder = tmp_path / 'x'
    if file is not None:
        path = folder / (file or 'notes.txt')
        path.parent.mkdir(parents=True)
        path.touch()
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
        (
            {'num_hidden_layers': 3},
            r"'model\.layers\.3\.input_layernorm\.weight' in model\.safetensors is left over",
        ),
        ({'num_hidden_layers': 5}, r"'model\.layers\.4\..*' is missing, which InternLM has"),
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
        (
            lambda s: s.pop('model.norm.weight'),
            r"'model\.norm\.weight' is missing, which InternLM has",
        ),
        (
            lambda s: s.update({'model.layers.1.mlp.gate_proj.bias': torch.ones(48)}),
            r"'model\.layers\.1\.mlp\.gate_proj\.bias' in model\.safetensors is left over \(of 1\)",
        ),
        (lambda s: s.update({'model.norm.weight': torch.ones(31)}), r'\[31\]; expected \[32\]'),
        (
            lambda s: s.update({'score.weight': torch.ones(31)}),
            r"model\.safetensors: weight 'score\.weight' is unknown",
        ),
        (
            lambda s: s.update({'model.norm.weight': torch.ones(32, dtype=torch.int8)}),
            r"'model\.norm\.weight' in model\.safetensors is int8; .* quantised weights are not",
        ),
    ],
)
def test_weights_that_do_not_fit(hf, edit, message):
    edit_weights(hf, edit)
    with pytest.raises(ValueError, match=message):
        open_source(hf)


@pytest.mark.parametrize(
    ('edit', 'message'),
    [
        (lambda s, w: s.pop(w), r"'model\.layers\.2\.attention\.wqkv\.weight' is missing"),
        (
            lambda s, w: s.update({w: s[w][:-1]}),
            r"model\.safetensors: 'model\.layers\.2\.attention\.wqkv\.weight' has shape "
            r'\[63, 32\], which does not fit: 63 rows are no whole number of heads',
        ),
        (
            lambda s, w: s.update({w: s[w][:32]}),
            r"q_proj of 'model\.layers\.2\.attention\.wqkv\.weight' in model\.safetensors has "
            r'shape \[16, 32\]; expected \[32, 32\]',
        ),
        (
            lambda s, w: s.update({w.replace('weight', 'bias'): torch.ones(64)}),
            r"k_proj of .*wqkv\.bias' in model\.safetensors is left over \(of 3\)",
        ),
        (
            lambda s, w: s.update({w.replace('wqkv', 'wq'): torch.ones(64)}),
            r"model\.safetensors: weight 'model\.layers\.2\.attention\.wq\.weight' is unknown",
        ),
    ],
)
def test_packed_weights_that_do_not_fit(tmp_path, edit, message):
    with torch.device('meta'):
        model = InternLM2(**GROUPED)
    state = full_state(GROUPED, biases=False)
    export_hf(model, state, tmp_path / 'hf', format='internlm2', dtype='float32', verify=False)
    source = open_source(tmp_path / 'hf')
    assert all(torch.equal(source.weights[name], tensor) for name, tensor in state.items())
    edit_weights(tmp_path / 'hf', lambda s: edit(s, 'model.layers.2.attention.wqkv.weight'))
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / 'hf')


def test_pickled_code_in_a_folder(tmp_path, hf):
    """Where a `.bin` would run something, it is named and nothing is run."""

    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'ran'),)

    (hf / 'model.safetensors').unlink()
    (hf / 'model.safetensors.index.json').unlink()
    torch.save({'model.norm.weight': Harmful()}, hf / 'pytorch_model.bin')
    with pytest.raises(ValueError, match=r'pytorch_model\.bin holds pickled code .*mkdir'):
        open_source(hf)
    assert not (tmp_path / 'ran').exists()


def test_a_config_that_is_no_table(hf):
    (hf / 'config.json').write_text('[1]')
    with pytest.raises(
        ValueError, match=r'config\.json is truncated or damaged: it holds no table'
    ):
        open_source(hf)
    (hf / 'config.json').write_bytes(b'\xff\xfe{}')
    with pytest.raises(ValueError, match=r'config\.json is truncated or damaged'):
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
        ({'num_layers': 2}, 'model.num_layers=2, but .*hf holds InternLM with num_layers=4'),
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
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\..*bias' .* is left over"):
        check_same_model(model, open_source(hf))
