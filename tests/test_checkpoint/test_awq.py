"""Weights of 4 bits: packed here as the format says, and by LMDeploy itself."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from internlm_mm.checkpoint.awq import dequantise, dequantised, unpack
from tests.gguf_reference import llama_folder

GROUP = 16
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which of eight neighbours lies in the i-th four bits


def quantise(weight: np.ndarray, group: int):
    """Numbers of 4 bits, zero points and steps of a matrix [outputs, inputs], in float64."""
    grouped = weight.reshape(len(weight), -1, group)
    low, high = grouped.min(-1), grouped.max(-1)
    steps = np.maximum(high - low, 1e-5) / 15
    zeros = np.clip(-np.round(low / steps), 0, 15)
    numbers = np.clip(np.round(grouped / steps[..., None]) + zeros[..., None], 0, 15)
    return numbers.reshape(weight.shape).astype(int), zeros.astype(int), steps


def pack(numbers: np.ndarray) -> torch.Tensor:
    """[outputs, n] of 4 bits as [n, outputs / 8] of int32."""
    out = np.zeros((numbers.shape[1], len(numbers) // 8), dtype=np.int64)
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            for place, which in enumerate(ORDER):
                out[row, column] |= int(numbers[column * 8 + which, row]) << (4 * place)
    return torch.from_numpy(out.astype(np.uint32).view(np.int32))


def rounded(weight: torch.Tensor, group: int) -> torch.Tensor:
    """What 4 bits make of a matrix, unpacked all the way."""
    numbers, zeros, steps = quantise(weight.double().numpy(), group)
    zeros, steps = np.repeat(zeros, group, 1), np.repeat(steps, group, 1)
    return torch.from_numpy((numbers - zeros) * steps)


def is_quantised(name: str) -> bool:
    return name.endswith('_proj.weight')


@pytest.fixture
def plain(tmp_path, sentencepiece_model):
    return llama_folder(tmp_path / 'plain', sentencepiece_model)


@pytest.fixture
def folder(plain, tmp_path):
    """The same, quantised."""
    folder = tmp_path / 'awq'
    folder.mkdir()
    for file in plain.iterdir():
        if file.suffix != '.safetensors':
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / 'config.json').read_text())
    config['quantization_config'] = dict(
        quant_method='awq', version='gemm', bits=4, group_size=GROUP, zero_point=True
    )
    (folder / 'config.json').write_text(json.dumps(config))
    state = {}
    for name, weight in load_file(plain / 'model.safetensors').items():
        if not is_quantised(name):
            state[name] = weight
            continue
        numbers, zeros, steps = quantise(weight.double().numpy(), GROUP)
        module = name.removesuffix('weight')
        state[module + 'qweight'], state[module + 'qzeros'] = pack(numbers), pack(zeros)
        state[module + 'scales'] = torch.from_numpy(steps.T.copy()).half()
    save_file(state, folder / 'model.safetensors', {'format': 'pt'})
    return folder


def test_unpack():
    numbers = np.random.default_rng(0).integers(0, 16, (24, 5))
    assert torch.equal(unpack(pack(numbers)), torch.from_numpy(numbers.T).int())


def test_dequantised():
    weight = torch.randn(24, 3 * GROUP)
    numbers, zeros, steps = quantise(weight.double().numpy(), GROUP)
    ours = dequantised(pack(numbers), pack(zeros), torch.from_numpy(steps.T.copy()).float())
    torch.testing.assert_close(ours.double(), rounded(weight, GROUP), rtol=1e-6, atol=1e-7)
    assert (ours - weight).abs().max() < 0.51 * steps.max()


def test_the_plain_folder_holds_what_4_bits_gave(folder, plain, tmp_path):
    out = tmp_path / 'out'
    dequantise(folder, out)
    held, before = load_file(out / 'model.safetensors'), load_file(plain / 'model.safetensors')
    assert set(held) == set(before)
    for name, weight in before.items():
        if is_quantised(name):  # its steps are float16
            expected = rounded(weight, GROUP).float()
            torch.testing.assert_close(held[name], expected, rtol=2**-10, atol=0)
        else:
            assert torch.equal(held[name], weight)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys']
    assert model.dtype == torch.float32
    names = {file.name for file in plain.iterdir()}
    assert {file.name for file in out.iterdir()} == names


def test_dtype_and_an_existing_folder(folder, tmp_path):
    out = tmp_path / 'out'
    dequantise(folder, out, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(out / 'model.safetensors').values()} == {torch.bfloat16}
    assert json.loads((out / 'config.json').read_text())['dtype'] == 'bfloat16'
    with pytest.raises(FileExistsError, match='overwrite'):
        dequantise(folder, out)
    dequantise(folder, out, overwrite=True)
    assert json.loads((out / 'config.json').read_text())['dtype'] == 'float32'


def test_not_quantised(plain, tmp_path):
    with pytest.raises(ValueError, match='plain already'):
        dequantise(plain, tmp_path / 'out')
    with pytest.raises(FileNotFoundError, match=r'config\.json is missing'):
        dequantise(tmp_path, tmp_path / 'out')


@pytest.mark.parametrize(
    ('key', 'value'), [('quant_method', 'gptq'), ('bits', 8), ('version', 'gemv')]
)
def test_another_quantisation(folder, tmp_path, key, value):
    config = json.loads((folder / 'config.json').read_text())
    config['quantization_config'][key] = value
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f'{key}={value!r}; only'):
        dequantise(folder, tmp_path / 'out')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda state, key: state.pop(key + 'scales'), 'and no scales'),
        (
            lambda state, key: state.update({key + 'qzeros': state[key + 'qzeros'][:1].clone()}),
            r'q_proj\.qzeros has shape \[1, 4\], expected \[2, 4\]',
        ),
    ],
    ids=['missing', 'another shape'],
)
def test_damaged(folder, tmp_path, change, message):
    state = load_file(folder / 'model.safetensors')
    change(state, 'model.layers.1.self_attn.q_proj.')
    save_file(state, folder / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(ValueError, match=message):
        dequantise(folder, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
@pytest.mark.skipif(find_spec('lmdeploy') is None, reason='lmdeploy is not installed')
def test_what_lmdeploy_writes(plain, tmp_path):
    options = ['--device', 'cpu', '--calib-samples', '0', '--w-group-size', str(GROUP)]
    command = [sys.executable, '-m', 'lmdeploy', 'lite', 'auto_awq', str(plain), *options]
    environment = os.environ | {'HF_HUB_OFFLINE': '1'}
    subprocess.run(
        [*command, '--work-dir', str(tmp_path / 'awq')], check=True, env=environment, timeout=600
    )
    dequantise(tmp_path / 'awq', tmp_path / 'out')
    held, before = (load_file(tmp_path / n / 'model.safetensors') for n in ('out', 'plain'))
    assert set(held) == set(before)
    for name, weight in before.items():
        if is_quantised(name):
            # Theirs is in float16 or float32: a number next to the middle may go either way.
            step = quantise(weight.double().numpy(), GROUP)[2].max()
            expected = rounded(weight, GROUP)
            wrong = (held[name] - expected).abs() > 2e-3 * weight.abs().max()
            assert wrong.float().mean() < 0.01
            assert (held[name] - expected).abs().max() < 1.1 * step
        else:
            torch.testing.assert_close(held[name], weight, rtol=1e-3, atol=1e-3)
