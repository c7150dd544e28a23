"""GGUF files: against a float64 model after llama.cpp's source, and against llama.cpp itself."""

import json

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from internlm_mm.api import from_pretrained
from internlm_mm.checkpoint.gguf import interleave, write_gguf
from internlm_mm.inference import Sampling
from tests.gguf_reference import (
    fields_of,
    llama_folder,
    logits_of_file,
    logits_of_folder,
    tensors_of,
)

IDS = [1, 7, 300, 42, 42, 511, 9, 260, 3, 128] * 6

ROPES = {
    'default': {},
    'another theta': {'rope_parameters': {'rope_type': 'default', 'rope_theta': 500.0}},
    'linear': {'rope_parameters': {'rope_type': 'linear', 'factor': 4.0, 'rope_theta': 10_000.0}},
    'yarn': {
        'rope_parameters': {
            'rope_type': 'yarn',
            'factor': 8.0,
            'rope_theta': 100.0,
            'original_max_position_embeddings': 64,
        }
    },
    'yarn with an attention factor': {
        'rope_parameters': {
            'rope_type': 'yarn',
            'factor': 8.0,
            'rope_theta': 100.0,
            'original_max_position_embeddings': 64,
            'attention_factor': 0.8,
        }
    },
    'llama3': {
        'rope_parameters': {
            'rope_type': 'llama3',
            'factor': 8.0,
            'low_freq_factor': 1.0,
            'high_freq_factor': 4.0,
            'original_max_position_embeddings': 64,
            'rope_theta': 100.0,
        }
    },
}
SHAPES = {
    'key heads shared': dict(num_key_value_heads=2),
    'wide heads': dict(head_dim=16, num_key_value_heads=1),
    'no biases': dict(attention_bias=False),
    'tied': dict(tie_word_embeddings=True),
}


@pytest.fixture
def convert(tmp_path, sentencepiece_model):
    def run(dtype='float32', options=None, **changes):
        folder = llama_folder(tmp_path / 'folder', sentencepiece_model, dtype, **changes)
        out = tmp_path / 'out.gguf'
        write_gguf(folder, out, **(options or {}))
        return folder, out

    return run


@pytest.mark.parametrize('changes', [*ROPES.values(), *SHAPES.values()], ids=[*ROPES, *SHAPES])
def test_the_file_computes_what_the_folder_does(convert, changes):
    folder, out = convert(**changes)
    theirs, ours = logits_of_folder(folder, IDS), logits_of_file(out, IDS)
    # transformers has its rotary table in float32: 2^-24 of angles up to 60.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-5 * np.abs(theirs).max())


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_dtypes(convert, dtype):
    folder, out = convert(dtype)
    stored = {t.name: t.tensor_type.name for t in GGUFReader(out).tensors}
    matrices = {name for name in stored if 'norm' not in name and not name.endswith('.bias')}
    short = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16'}[dtype]
    assert {stored[name] for name in matrices} == {short}
    assert {stored[name] for name in set(stored) - matrices} == {'F32'}
    held = load_file(folder / 'model.safetensors')
    written = tensors_of(out)
    for theirs, ours in (
        ('model.embed_tokens.weight', 'token_embd.weight'),
        ('model.layers.1.mlp.down_proj.weight', 'blk.1.ffn_down.weight'),
        ('model.layers.1.self_attn.v_proj.bias', 'blk.1.attn_v.bias'),
    ):
        np.testing.assert_array_equal(written[ours], held[theirs].double().numpy())


def test_another_dtype_than_the_folder_has(convert):
    folder, out = convert('float32', {'dtype': 'f16'})
    weight = load_file(folder / 'model.safetensors')['lm_head.weight']
    np.testing.assert_array_equal(tensors_of(out)['output.weight'], weight.half().numpy())
    assert fields_of(out)['general.file_type'] == 1


def test_interleave_puts_turning_pairs_side_by_side():
    rows = torch.arange(2 * 6)
    assert interleave(rows, heads=2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    matrix = torch.stack([rows, -rows], 1)
    assert torch.equal(interleave(matrix, heads=2)[:, 1], -interleave(rows, heads=2))


def test_metadata(convert):
    _, out = convert(num_key_value_heads=2, rms_norm_eps=1e-5)
    fields = fields_of(out)
    assert fields['general.architecture'] == 'llama'
    assert fields['llama.context_length'] == 256
    assert fields['llama.attention.head_count_kv'] == 2
    assert fields['llama.attention.layer_norm_rms_epsilon'] == pytest.approx(1e-5)
    assert len(fields['tokenizer.ggml.tokens']) == fields['llama.vocab_size'] == 512
    assert fields['tokenizer.ggml.bos_token_id'] == 1
    assert fields['tokenizer.ggml.eos_token_id'] == 2
    assert fields['tokenizer.ggml.eot_token_id'] == 5
    assert fields['tokenizer.ggml.add_bos_token'] is True
    assert fields['tokenizer.ggml.add_space_prefix'] is False


def test_an_existing_file(convert, tmp_path):
    folder, out = convert()
    before = out.read_bytes()
    with pytest.raises(FileExistsError, match='overwrite'):
        write_gguf(folder, out)
    write_gguf(folder, out, overwrite=True)
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ['folder', 'out.gguf']


def edit(folder, **changes):
    file = folder / 'config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(model_type='internlm'), "model_type='internlm'.*--format llama"),
        (dict(hidden_act='gelu'), "hidden_act='gelu'; only 'silu'"),
        (dict(sliding_window=32), 'sliding_window=32'),
        (dict(quantization_config={'bits': 4}), 'quantised'),
        (dict(num_hidden_layers=3), "13 weights are missing, the first is 'model.layers.2"),
        (dict(num_hidden_layers=1), "have no place in GGUF, the first is 'model.layers.1"),
        (dict(intermediate_size=50), r'shape \[48, 32\] in the files and \[50, 32\]'),
        (dict(vocab_size=400), r'shape \[512, 32\] in the files and \[400, 32\]'),
        (dict(rope_parameters={'rope_type': 'dynamic', 'factor': 2.0}), 'dynamic'),
    ],
    ids=str,
)
def test_what_does_not_fit_leaves_nothing(convert, tmp_path, changes, message):
    folder, out = convert()
    out.unlink()
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        write_gguf(folder, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['folder']


def test_numbers_too_large_for_the_dtype(convert, tmp_path):
    folder, out = convert()
    out.unlink()
    state = load_file(folder / 'model.safetensors')
    state['lm_head.weight'][3, 4] = -1e6
    save_file(state, folder / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(ValueError, match=r'output.weight has 1e\+06 in it, too large'):
        write_gguf(folder, out, dtype='f16')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['folder']
    write_gguf(folder, out, dtype='bf16')


def test_no_such_dtype(convert):
    folder, out = convert()
    with pytest.raises(ValueError, match=r"'fp16' cannot be written\. Did you mean 'f16'"):
        write_gguf(folder, out, dtype='fp16', overwrite=True)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'config\.json is missing'):
        write_gguf(tmp_path, tmp_path / 'out.gguf')


@pytest.mark.slow
@pytest.mark.parametrize('changes', [*ROPES.values(), *SHAPES.values()], ids=[*ROPES, *SHAPES])
def test_llama_cpp_gives_the_same_greedy_tokens(convert, changes):
    reason = 'llama.cpp is not installed: pip install llama-cpp-python'
    llama_cpp = pytest.importorskip('llama_cpp', reason=reason)
    folder, out = convert(**changes)
    exact = dict.fromkeys(('type_k', 'type_v'), llama_cpp.GGML_TYPE_F32)  # else a cache in float16
    model = llama_cpp.Llama(
        str(out), n_ctx=256, n_threads=1, verbose=False, logits_all=True, **exact
    )
    prompt = IDS[:20]
    theirs = []
    for token in model.generate(prompt, temp=0.0):
        theirs.append(token)
        if len(theirs) == 64:
            break
    steps = from_pretrained(folder).generate_ids([prompt], Sampling(max_new_tokens=64))
    assert theirs == [token for (token,) in steps]
    scores = np.array(model.scores[: len(prompt) + 63])
    expected = logits_of_folder(folder, prompt + theirs[:-1])
    # float32 sums in another order, in two layers.
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    model.close()
