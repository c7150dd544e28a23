"""From a training checkpoint to a model at work, here and in transformers."""

import json
import shutil
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from internlm_mm.checkpoint.pretrained import convert_to_hf, load_model, load_tokenizer_of
from internlm_mm.models import InternLM, InternLM2, Mistral, Qwen3
from tests.trained import train_tokenizer, trained_run

pytestmark = pytest.mark.filterwarnings('ignore:torch.distributed is disabled:UserWarning')


@pytest.fixture
def run(tmp_path):
    return trained_run(tmp_path)


def test_checkpoint_to_transformers(run, tmp_path):
    work_dir, model, tokenizer = run
    out = tmp_path / 'hf'
    difference = convert_to_hf(work_dir, out, dtype='float32')
    assert difference < 1e-4
    theirs = AutoModelForCausalLM.from_pretrained(out)
    ids = tokenizer.encode('def f7(x): return')
    assert AutoTokenizer.from_pretrained(out).encode('def f7(x): return') == [1, *ids]
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (1, 2)
    assert theirs.generation_config.eos_token_id == 2
    torch.testing.assert_close(
        theirs(torch.tensor([ids])).logits, model.logits(torch.tensor([ids])), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize('of', ['work dir', 'checkpoint', 'hf folder'])
def test_load_model(run, tmp_path, of):
    path, model, tokenizer = run
    if of == 'checkpoint':
        path = path / 'iter_3'
    elif of == 'hf folder':
        convert_to_hf(path, tmp_path / 'hf', dtype='float32')
        path = tmp_path / 'hf'
    loaded = load_model(path)
    assert not loaded.training
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
        assert not parameter.requires_grad
    assert load_tokenizer_of(path).encode('x + 1') == tokenizer.encode('x + 1')
    assert {p.dtype for p in load_model(path, dtype=torch.bfloat16).parameters()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize(
    ('family', 'format', 'architecture'),
    [
        (InternLM, None, 'LlamaForCausalLM'),
        (InternLM, 'internlm', 'InternLMForCausalLM'),
        (InternLM2, None, 'LlamaForCausalLM'),
        (InternLM2, 'internlm2', 'InternLM2ForCausalLM'),
        (Mistral, None, 'LlamaForCausalLM'),
        (Mistral, 'mistral', 'MistralForCausalLM'),
        (Qwen3, None, 'Qwen3ForCausalLM'),
    ],
)
def test_formats(tmp_path, family, format, architecture):
    work_dir, model, _ = trained_run(tmp_path, family)
    assert convert_to_hf(work_dir, tmp_path / 'hf', format=format, dtype='float32') < 1e-4
    config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
    assert config['architectures'] == [architecture]
    assert ('auto_map' in config) is ('InternLM' in architecture)
    again = load_model(tmp_path / 'hf')
    ids = torch.randint(model.vocab_size, (2, 30))
    assert torch.equal(again.logits(ids), model.logits(ids))


def test_a_format_that_the_family_has_not(run, tmp_path):
    with pytest.raises(ValueError, match="format='internlm2': InternLM can be written as llama or"):
        convert_to_hf(run[0], tmp_path / 'hf', format='internlm2')
    assert not (tmp_path / 'hf').exists() and not (tmp_path / 'hf.tmp').exists()


def test_bars(run, tmp_path, capsys):
    convert_to_hf(run[0], tmp_path / 'quiet')
    assert not capsys.readouterr().err
    convert_to_hf(run[0], tmp_path / 'hf', show_progress=True)
    shown = capsys.readouterr().err
    assert 'writing' in shown and 'comparing' in shown


def test_what_does_not_fit_is_named(run, tmp_path):
    convert_to_hf(run[0], tmp_path / 'hf')
    file = tmp_path / 'hf' / 'model.safetensors'
    tensors = load_file(file)
    del tensors['model.layers.1.mlp.up_proj.weight']
    save_file(tensors, file, {'format': 'pt'})
    (tmp_path / 'hf' / 'model.safetensors.index.json').unlink()
    with pytest.raises(ValueError, match=r"hf: 'model\.layers\.1\.mlp\.up_.*' is missing"):
        load_model(tmp_path / 'hf')


def test_another_tokenizer_is_refused_before_anything_is_written(run, tmp_path):
    symbols = [f'<u{i}>' for i in range(200)]
    other = train_tokenizer(tmp_path / 'other', vocab_size=600, user_defined_symbols=symbols)
    assert other.vocab_size > run[2].vocab_size
    with pytest.raises(ValueError, match=f'vocab_size={other.vocab_size} and the model'):
        convert_to_hf(run[0], tmp_path / 'hf', tokenizer=tmp_path / 'other')
    assert not (tmp_path / 'hf').exists() and not (tmp_path / 'hf.tmp').exists()


def test_a_damaged_checkpoint_is_refused(run, tmp_path):
    shard = next((run[0] / 'iter_3').glob('*.safetensors'))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match='is damaged'):
        convert_to_hf(run[0] / 'iter_3', tmp_path / 'hf')
    with pytest.raises(ValueError, match='is damaged'):
        load_model(run[0] / 'iter_3')


@pytest.mark.parametrize('key', ['type', 'objective'])
def test_a_config_calls_nothing_but_a_model(run, tmp_path, key):
    work_dir, _, _ = run
    [folder] = work_dir.glob('iter_*')
    config = json.loads((folder / 'config.json').read_text())
    ran = tmp_path / 'ran'
    call = {'type': 'os.system', 'command': f'touch {ran}'}
    config['model'] = call if key == 'type' else {**config['model'], 'objective': call}
    content = json.dumps(config).encode()
    (folder / 'config.json').write_bytes(content)
    manifest = json.loads((folder / 'manifest.json').read_text())
    manifest['files']['config.json'] = {'size': len(content), 'crc32': zlib.crc32(content)}
    (folder / 'manifest.json').write_text(json.dumps(manifest))
    if key == 'type':
        with pytest.raises(ValueError, match=r"model\.type='os\.system' is no model"):
            load_model(work_dir)
    else:
        load_model(work_dir)
    assert not ran.exists()


def test_without_a_tokenizer(run, tmp_path):
    convert_to_hf(run[0], tmp_path / 'hf')
    for file in (tmp_path / 'hf').glob('tokenizer*'):
        file.unlink()
    assert load_tokenizer_of(tmp_path / 'hf') is None


def test_no_model_there(run, tmp_path):
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / 'nothing')
    shutil.rmtree(run[0] / 'iter_3')
    with pytest.raises(FileNotFoundError, match='no whole checkpoint'):
        load_model(run[0])
