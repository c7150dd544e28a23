"""From a training checkpoint to a model at work, here and in transformers."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from internlm_mm.checkpoint.pretrained import convert_to_hf, load_model, load_tokenizer_of
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
