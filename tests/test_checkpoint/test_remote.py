"""Folders with modeling files of ours, loaded as a user without this project loads them."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from internlm_mm.checkpoint.hf_import import fill_model
from internlm_mm.checkpoint.huggingface import export_hf
from internlm_mm.checkpoint.remote import FORMATS, model_class, write_remote_code
from internlm_mm.checkpoint.streaming import hf_model, streamed
from internlm_mm.models import InternLM, InternLM2
from internlm_mm.tokenizers import Tokenizer, load_tokenizer
from tests.forms import DYNAMIC, weights_of

SIZES = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=8,
    max_seq_len=128,
    rope_scaling=DYNAMIC,
)
FAMILIES = {'internlm': (InternLM, {}), 'internlm2': (InternLM2, dict(num_kv_heads=2))}
IDS = [[1, 5, 9, 200, 30, 7], [1, 400, 3, 77, 8, 9]]

STRANGER = """
import importlib.util, json, sys
import torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
)

folder, again, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
assert importlib.util.find_spec('internlm_mm') is None
said = {}
try:
    AutoConfig.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    said['refused'] = str(error)
trust = {'trust_remote_code': True}
said['AutoConfig'] = type(AutoConfig.from_pretrained(folder, **trust)).__name__
said['AutoModel'] = type(AutoModel.from_pretrained(folder, **trust)).__name__
classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **trust)
said['AutoModelForSequenceClassification'] = type(classifier).__name__
model = AutoModelForCausalLM.from_pretrained(folder, **trust).eval()
said['AutoModelForCausalLM'] = type(model).__name__
tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
said['chat'] = model.chat(tokenizer, 'hello', history=[], do_sample=False, max_new_tokens=8)
said['stream_chat'] = list(
    model.stream_chat(tokenizer, 'hello', history=[], do_sample=False, max_new_tokens=8)
)
with torch.no_grad():
    said['logits'] = model(torch.tensor(ids)).logits.tolist()
    model.save_pretrained(again)
    saved = AutoModelForCausalLM.from_pretrained(again, **trust)
    said['logits of the saved'] = saved(torch.tensor(ids)).logits.tolist()
print('SAID', json.dumps(said))
"""


def export(folder: Path, name: str, tokenizer: Tokenizer | None = None) -> torch.nn.Module:
    """A folder as `convert2hf --format` makes it; gives our model, which is in it."""
    family, options = FAMILIES[name]
    with torch.device('meta'):
        model = family(**SIZES, **options)
    weights = weights_of(model)
    export_hf(model, weights, folder, format=name, dtype='float32', tokenizer=tokenizer)
    return fill_model(model, weights, 'cpu', torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize('name', FORMATS)
def test_a_stranger_loads_a_folder(tmp_path, name, sentencepiece_model):
    folder, again = tmp_path / 'hf', tmp_path / 'again'
    model = export(folder, name, load_tokenizer(sentencepiece_model))
    script = tmp_path / 'stranger.py'
    script.write_text(STRANGER)
    environment = {
        'PATH': os.environ['PATH'],
        'HOME': str(tmp_path),
        'HF_HOME': str(tmp_path / 'cache'),
        'HF_HUB_OFFLINE': '1',
        'OMP_NUM_THREADS': '1',
        # The environment of tests may have the project installed; -S and this leave it out.
        'PYTHONPATH': os.pathsep.join(p for p in sys.path if p.endswith('site-packages')),
    }
    command = [sys.executable, '-S', script, folder, again, json.dumps(IDS)]
    done = subprocess.run(
        [str(part) for part in command], cwd=tmp_path, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    said = json.loads(done.stdout.decode().partition('SAID ')[2])

    family = FORMATS[name].family
    assert 'trust_remote_code' in said['refused']
    assert said['AutoConfig'] == f'{family}Config'
    assert said['AutoModel'] == said['AutoModelForCausalLM'] == f'{family}ForCausalLM'
    classifier = said['AutoModelForSequenceClassification']
    assert classifier == f'{family}ForSequenceClassification'
    response, history = said['chat']
    assert history == [['hello', response]]
    assert said['stream_chat'][-1] == said['chat']
    logits = model.logits(torch.tensor(IDS))
    for key in ('logits', 'logits of the saved'):
        torch.testing.assert_close(torch.tensor(said[key]), logits, rtol=0, atol=1e-4)
    files = {path.name for path in again.glob('*.py')}
    assert files == set(FORMATS[name].files)
    assert json.loads((again / 'config.json').read_text())['auto_map'] == FORMATS[name].auto_map


@pytest.mark.parametrize('name', FORMATS)
def test_the_gate_runs_our_code_and_none_of_the_folder_s(tmp_path, name):
    folder = tmp_path / 'hf'
    model = export(folder, name)
    for file in FORMATS[name].files:
        (folder / file).write_text('raise SystemExit("code of the folder was run")\n')
    ids = torch.tensor(IDS)
    with torch.inference_mode():
        expected = model.logits(ids)
        other, weights = hf_model(folder)
        assert all(parameter.is_meta for parameter in other.parameters())
        with streamed(other, weights):
            logits = other(ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert type(other).__module__.startswith('internlm_mm.checkpoint.remote_code.')


@pytest.mark.parametrize('name', FORMATS)
def test_the_auto_map_names_what_the_files_have(tmp_path, name):
    said = write_remote_code(tmp_path, name)
    files = {path.stem: ast.parse(path.read_text()) for path in tmp_path.iterdir()}
    assert {f'{file}.py' for file in files} == set(FORMATS[name].files)
    for place in said['auto_map'].values():
        file, _, class_name = place.partition('.')
        classes = [node.name for node in files[file].body if isinstance(node, ast.ClassDef)]
        assert class_name in classes
    imported = {
        node.module
        for tree in files.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    }
    assert imported <= set(files)


def test_other_formats(tmp_path):
    with pytest.raises(ValueError, match=r"'internlm3'.*'internlm"):
        model_class({'model_type': 'internlm3'})
    with pytest.raises(ValueError, match="no modeling files for 'llama'"):
        write_remote_code(tmp_path, 'llama')
