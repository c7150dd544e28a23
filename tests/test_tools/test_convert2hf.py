"""The command line; what it does is tested in test_checkpoint/test_pretrained.py."""

import argparse
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trained import adapted_run, trained_run
from tools.convert2hf import main, parse_size

pytestmark = pytest.mark.filterwarnings('ignore:torch.distributed is disabled:UserWarning')


@pytest.fixture
def run(tmp_path):
    return trained_run(tmp_path)


def test_last_line_is_the_difference(run, tmp_path, capsys):
    out = tmp_path / 'hf'
    options = ['--dtype', 'float32', '--max-shard-size', '20KB']
    assert main([str(run[0]), str(out), *options]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert float(re.fullmatch(r'logits_max_difference: (\S+)', last)[1]) < 1e-4
    assert len(list(out.glob('*.safetensors'))) > 2
    AutoModelForCausalLM.from_pretrained(out)


def test_formats(run, tmp_path, capsys):
    out = tmp_path / 'hf'
    assert main([str(run[0]), str(out), '--format', 'internlm']) == 0
    assert (out / 'modeling_internlm.py').exists()
    capsys.readouterr()
    assert main([str(run[0]), str(tmp_path / 'other'), '--format', 'qwen2']) == 2
    assert 'InternLM can be written as llama or internlm' in capsys.readouterr().err
    assert not (tmp_path / 'other').exists()


def test_chat_template(run, tmp_path, capsys):
    out = tmp_path / 'hf'
    assert main([str(run[0]), str(out), '--chat-template', 'internlm']) == 0
    tokenizer = AutoTokenizer.from_pretrained(out)
    messages = [{'role': 'user', 'content': 'def'}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == '<s><|User|>:def<eoh>\n<|Bot|>:'
    capsys.readouterr()
    assert main([str(run[0]), str(tmp_path / 'no'), '--chat-template', 'interlm']) == 2
    assert "'interlm'. Did you mean 'internlm'?" in capsys.readouterr().err
    assert not (tmp_path / 'no').exists()


def test_internlm_spelling(run, tmp_path):
    work_dir, _, tokenizer = run
    out = tmp_path / 'hf'
    arguments = ['--src_folder', str(work_dir), '--tgt_folder', str(out)]
    assert main([*arguments, '--tokenizer', str(tokenizer.path)]) == 0
    assert (out / 'config.json').exists()


def test_an_existing_folder(run, tmp_path, capsys):
    arguments = [str(run[0]), str(tmp_path / 'hf')]
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert 'exists' in capsys.readouterr().err
    assert main([*arguments, '--overwrite']) == 0


@pytest.mark.parametrize('arguments', [[], ['a'], ['a', 'b', '--src_folder', 'c']])
def test_paths_once_each(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert 'once' in capsys.readouterr().err


def test_no_checkpoint(tmp_path, capsys):
    assert main([str(tmp_path / 'nothing'), str(tmp_path / 'hf')]) == 2
    assert 'nothing does not exist' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('text', 'size'), [('5GB', 5 * 10**9), ('1.5 mb', 1_500_000), ('20KB', 20_000), ('77', 77)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize('text', ['', 'GB', '-1GB', '0', '5TB'])
def test_no_sizes(text):
    with pytest.raises(argparse.ArgumentTypeError, match='is no size'):
        parse_size(text)


def test_adapters_are_merged_or_written_alone(tmp_path, capsys):
    hf, work_dir, model = adapted_run(tmp_path)
    assert main([str(work_dir), str(tmp_path / 'out'), '--dtype', 'float32']) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
    ids = torch.randint(300, (2, 30))
    wanted = model.logits(ids)
    assert (merged(ids).logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert main([str(work_dir), str(tmp_path / 'peft'), '--adapter']) == 0
    written = (tmp_path / 'peft' / 'adapter_model.safetensors').stat().st_size
    assert capsys.readouterr().out.splitlines()[-1] == f'adapter_bytes: {written}'
    hf.rename(tmp_path / 'moved')
    assert main([str(work_dir), str(tmp_path / 'again')]) == 2
    assert 'say with base where they are now' in capsys.readouterr().err
    moved = ['--base', str(tmp_path / 'moved')]
    assert main([str(work_dir), str(tmp_path / 'again'), *moved]) == 0
    assert main([str(tmp_path / 'work'), str(tmp_path / 'none'), '--adapter']) == 2
    assert 'has no adapters: model.adapter is not in its config' in capsys.readouterr().err
