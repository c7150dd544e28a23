"""The four commands of docs/en/import.md: from somebody's folder to a folder of one's own."""

import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import internlm_mm
from internlm_mm.checkpoint.step_folders import read_config, read_model_state
from internlm_mm.engine import train_cli
from internlm_mm.utils.config import load_config
from tools import chat, convert2hf, convert_from, preprocess_data

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / 'docs' / 'en' / 'import.md').read_text(encoding='utf-8')
PROGRAMS = {
    'preprocess_data': preprocess_data.main,
    'train': train_cli.main,
    'convert2hf': convert2hf.main,
    'chat': chat.main,
    'convert_from': convert_from.main,
}
TEXT = (REPOSITORY / 'tests' / 'helpers.py').read_text(encoding='utf-8')


def commands() -> list[list[str]]:
    """Those of the first block of the page, without `python -m internlm_mm`."""
    block = re.search(r'```shell\n(.*?)```', PAGE, re.S)
    assert block is not None
    return [shlex.split(line)[3:] for line in block[1].splitlines()]


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `hf_base` as transformers writes it, and the page's config and texts beside it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=['<s>', '</s>'],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token='<s>', eos_token='</s>'
    )  # fmt: skip
    fast.save_pretrained(tmp_path / 'hf_base')
    config = LlamaConfig(
        vocab_size=416,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / 'hf_base')
    source = re.search(r'```python\n(.*?load_from = .*?)```', PAGE, re.S)
    assert source is not None
    (tmp_path / 'more.py').write_text(source[1])
    (tmp_path / 'texts').mkdir()
    (tmp_path / 'texts' / 'code.jsonl').write_text(json.dumps({'text': TEXT * 40}) + '\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: list[str]) -> int:
    return PROGRAMS[command[0]](command[1:]) or 0


def test_from_a_folder_to_a_folder(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [command[0] for command in commands()] == list(PROGRAMS)[:4]
    for command in commands():
        assert run(command) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert 'def main(' in printed
    losses = [float(loss) for loss in re.findall(r'\| loss ([\d.]+)', printed)]
    assert losses[-1] < losses[0]
    before, after = (load_file(published / f / 'model.safetensors') for f in ('hf_base', 'hf_more'))
    assert set(before) == set(after)
    step = max(float((before[name] - after[name]).abs().max()) for name in before)
    assert 0 < step <= 20 * 1.2e-4  # AdamW: 20 steps of at most the rate, and the decay of it
    config = read_config('work_dirs/more')
    assert config['model']['num_kv_heads'] == 2 and config['load_from'] == 'hf_base'
    mine = LlamaForCausalLM.from_pretrained('hf_more', dtype=torch.float32)
    assert mine.config.max_position_embeddings == 256
    words = PreTrainedTokenizerFast.from_pretrained('hf_more')
    assert words.encode('def main(') == PreTrainedTokenizerFast.from_pretrained('hf_base').encode(
        'def main('
    )


def test_a_checkpoint_of_a_folder_goes_the_same_way(
    published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`convert_from` and `--load-from` of what it makes, and bit for bit out again."""
    assert run(commands()[0]) == 0
    assert run(['convert_from', 'hf_base', 'work_dirs/base']) == 0
    assert ', a tokenizer of 400; a Hugging Face folder\n' in capsys.readouterr().out
    options = ['--load-from', 'work_dirs/base', '--work-dir', 'work_dirs/next']
    assert run(['train', 'more.py', *options, '--dry-run']) == 0
    plan = capsys.readouterr().out
    assert 'start      model of work_dirs/base/iter_0' in plan
    assert 'tokenizer  400 tokens of 416 in the model' in plan
    assert run(['convert2hf', 'work_dirs/base', 'again']) == 0
    before, after = (load_file(published / f / 'model.safetensors') for f in ('hf_base', 'again'))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert set(before) == set(after) and len(read_model_state('work_dirs/base')) == len(before)


def test_the_example_in_python(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = re.search(r'```python\n(from internlm_mm.checkpoint.*?)```', PAGE, re.S)
    assert source is not None
    (published / 'example.py').write_text(source[1])
    runpy.run_path('example.py')
    tensors = load_file('hf_base/model.safetensors')
    deviation = tensors['model.layers.0.self_attn.q_proj.weight'].std()
    assert capsys.readouterr().out == f'Llama 2 {len(tensors)}\n{deviation!r}\n'
    assert read_config('work_dirs/base')['strategy']['precision']['param'] == 'bfloat16'


def test_from_python(published: Path) -> None:
    assert run(commands()[0]) == 0
    shutil.copytree('hf_base', 'hf_other')
    config = load_config('more.py')
    config.pop('load_from')  # and there is no model in it
    with pytest.raises(ValueError, match=r'the config has no model: .* or load_from to take its'):
        internlm_mm.train(config, work_dir='work_dirs/none')
    options = {'train_cfg.max_iters': 1, 'load_from': {'path': 'hf_other'}}
    checkpoint = internlm_mm.train(config, work_dir='work_dirs/mine', options=options)
    assert checkpoint == Path('work_dirs/mine/iter_1')
    weights, before = read_model_state(checkpoint), load_file('hf_base/model.safetensors')
    difference = weights['norm.weight'] - before['model.norm.weight']
    assert 0 < float(difference.abs().max()) < 1.2e-4  # one step


def test_data_of_another_tokenizer_is_refused(
    published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Tokenizer(models.WordLevel({'<unk>': 0, 'other': 1, '</s>': 2}, unk_token='<unk>'))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=other, unk_token='<unk>', eos_token='</s>'
    ).save_pretrained('other')
    config = Path('more.py').read_text()
    Path('more.py').write_text(
        config.replace("HFTokenizer, path='hf_base'", "HFTokenizer, path='other'")
    )
    command = [part.replace('hf_base', 'other') for part in commands()[0]]
    assert run([*command, '--no-bos']) == 0
    assert run(['train', 'more.py', '--dry-run']) == 2
    message = capsys.readouterr().err
    assert 'the one of the config and the one in hf_base' in message
    assert 'tokenise the data with --tokenizer hf_base' in message
