"""The configs of tool calls, and the check of their data."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from internlm_mm.utils.config import load_config
from internlm_mm.utils.config_check import check_config
from tests.conversations import CALLING, PLAIN, TOOLS, WEATHER, call, internlm_model
from tests.runs import REPOSITORY

PROJECT = REPOSITORY / 'projects' / 'tool_agent'
CONFIGS = sorted((PROJECT / 'configs').glob('*.py'))
SCHEMA = {'type': 'object', 'properties': {'city': {'type': 'string'}}, 'required': ['city']}
TOOL = {'type': 'function', 'function': WEATHER['function'] | {'parameters': SCHEMA}}
UNUSED = {'type': 'function', 'function': {'name': 'spare'}}


@pytest.fixture(scope='module')
def main():
    spec = importlib.util.spec_from_file_location('check_data', PROJECT / 'check_data.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules['check_data'] = module  # dataclasses look for it
    spec.loader.exec_module(module)
    yield module.main
    del sys.modules['check_data']


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    tokenizer = internlm_model(tmp_path / 'tokenizer')
    data = tmp_path / 'data'
    data.mkdir()
    return [
        '--cfg-options',
        f'tokenizer.path={tokenizer.path}',
        f'train_dataloader.dataset.path={data}',
    ]


def write(options: list[str], *records: dict) -> Path:
    file = Path(options[-1].partition('=')[2]) / 'weather.jsonl'
    file.write_text('\n'.join(map(json.dumps, records)))
    return file


def asked(arguments: dict) -> dict:
    answer = {'role': 'assistant', 'content': None, 'tool_calls': [call('weather', arguments, 'a')]}
    result = {'role': 'tool', 'tool_call_id': 'a', 'content': 'blue'}
    messages = [PLAIN[1], answer, result, PLAIN[2]]
    return {'messages': messages, 'tools': [TOOL, UNUSED]}


@pytest.mark.parametrize('config', CONFIGS, ids=lambda path: path.stem)
def test_configs(config: Path) -> None:
    loaded = load_config(config)
    check_config(loaded)
    expected = 'internlm2' if config.stem.startswith('internlm2') else 'internlm_v1_1'
    for part, folder in (('train', 'train'), ('val', 'validation')):
        dataset = loaded[f'{part}_dataloader'].dataset
        assert dataset.chat_template == expected and dataset.path == f'data/agent/{folder}'
    assert ('adapter' in loaded.model) == ('lora' in config.stem)
    assert len(config.read_text().splitlines()) <= 40


@pytest.mark.parametrize('config', ['internlm2_7b_agent', 'internlm_tiny_agent'])
def test_problems_are_named(config: str, main, options: list[str], capsys) -> None:
    file = write(options, asked({'city': 'Paris'}), {'messages': PLAIN}, asked({}))
    assert main([str(PROJECT / 'configs' / f'{config}.py'), *options]) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if ' - mmengine - ' not in line] == [
        f"{file}:3, message 1, tool_calls[0].function.arguments of 'weather': "
        "'city' is a required property",
        '2 conversations, 1 of them without a call; 1 problem',
        '1 calls of 1 tools: weather 1',
        'turns with calls in a conversation: 0: 1, 1: 1',
        'calls in a turn: 1: 1',
        'declared and never called: spare',
    ]


def test_good_data(main, options: list[str], capsys) -> None:
    write(options, asked({'city': 'Paris'}), {'messages': CALLING, 'tools': TOOLS})
    assert main([str(PROJECT / 'configs' / 'internlm2_7b_agent.py'), *options]) == 0
    assert '2 conversations, 0 of them without a call; 0 problems' in capsys.readouterr().out


def test_broken_lines_and_rows_that_are_cut(main, options: list[str], capsys) -> None:
    file = write(options, asked({'city': 'Paris ' * 200}))
    file.write_text(file.read_text() + '\n{"messages": [\n' + json.dumps({'messages': PLAIN}))
    cut = ['train_dataloader.dataset.overlong=truncate', 'train_dataloader.dataset.seq_len=512']
    assert main([str(PROJECT / 'configs' / 'internlm2_7b_agent.py'), *options, *cut]) == 1
    out = capsys.readouterr().out
    assert 'weather.jsonl:2: not JSON' in out and '1 conversations' in out
    assert 'weather.jsonl:1, document 0' in out and 'it is cut off inside a call' in out


def test_what_cannot_be_read(main, options: list[str], capsys) -> None:
    assert main([str(PROJECT / 'configs' / 'internlm2_7b_agent.py'), *options[:2]]) == 2
    assert 'error: ' in capsys.readouterr().err
    assert main(['internlm_tiny_pretrain']) == 2
    assert 'reads no conversations' in capsys.readouterr().err
