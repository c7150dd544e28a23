"""The configs of tool calls, and the check of their data."""

import html
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from internlm_mm import registry
from internlm_mm.utils.config import load_config
from internlm_mm.utils.config_check import check_config
from tests.conversations import CALLING, PLAIN, TOOLS, WEATHER, call, internlm_model
from tests.runs import REPOSITORY
from tools.browse_dataset import main as browse

PROJECT = REPOSITORY / 'projects' / 'tool_agent'
TASKS = PROJECT / 'configs' / 'agent_tasks.py'
CONFIGS = sorted(set((PROJECT / 'configs').glob('*.py')) - {TASKS})
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


def test_tasks_are_those_that_there_are() -> None:
    loaded = load_config(TASKS)
    tiny = load_config(PROJECT / 'configs' / 'internlm_tiny_agent.py')
    tasks = [*loaded.val_cfg.tasks, *tiny.val_cfg.tasks]
    built = [registry.TASKS.build(dict(task)) for task in tasks]
    assert [type(task).__name__ for task in built] == [
        'ToolCallTask', 'ToolCallTask', 'AgentTask', 'CodeTask', 'ProgramTask', 'ToolCallTask'
    ]  # fmt: skip


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


def changed(**function) -> dict:
    record = json.loads(json.dumps(asked({'city': 'Paris'})))
    record['messages'][1]['tool_calls'][0]['function'] |= function
    return record


def without_result() -> dict:
    record = asked({'city': 'Paris'})
    return record | {'messages': [m for m in record['messages'] if m['role'] != 'tool']}


def parallel() -> dict:
    record = asked({'city': 'Paris'})
    user, _, _, last = record['messages']
    calls = [call('weather', {'city': name}, name) for name in 'ab']
    results = [{'role': 'tool', 'tool_call_id': name, 'content': 'blue'} for name in 'ab']
    answer = {'role': 'assistant', 'content': None, 'tool_calls': calls}
    return record | {'messages': [user, answer, *results, last]}


DEFECTS = {
    'no JSON': (changed(arguments='{"city": '), 'tool_calls[0].function.arguments: no JSON'),
    'schema': (changed(arguments={'city': 3}), "['city']: 3 is not of type 'string'"),
    'unknown': (changed(name='wether'), "there is no tool 'wether'. Did you mean 'weather'?"),
    'dangling': (without_result(), "role 'assistant', but there is no result yet"),
    'parallel': (parallel(), "2 calls in a turn; 'internlm_v1_1' spells one"),
    'spelt already': ({'messages': [PLAIN[1], PLAIN[2] | {'content': 'It is.<eoa>'}]}, "'<eoa>'"),
}


@pytest.mark.parametrize('defect', list(DEFECTS))
def test_both_commands_find_the_same(defect: str, main, options: list[str], capsys) -> None:
    record, words = DEFECTS[defect]
    file = write(options, {'messages': PLAIN}, record)
    config = str(PROJECT / 'configs' / 'internlm_tiny_agent.py')
    found = []
    for command in (
        lambda given: main(given),
        lambda given: browse([*given[:1], '--check', *given[1:]]),
    ):
        assert command([config, *options]) == 1
        lines = capsys.readouterr().out.splitlines()
        found.append([line for line in lines if line.startswith(str(file))])
    assert found[0] == found[1] and any(words in line for line in found[0]), found


def test_marks_that_a_vocabulary_has_not(main, options: list[str], capsys) -> None:
    """Then they are no tokens of their own, and the ids of others."""
    write(options, asked({'city': 'Paris'}))
    other = 'train_dataloader.dataset.chat_template=chatml'
    assert main([str(PROJECT / 'configs' / 'internlm2_7b_agent.py'), *options, other]) == 0
    assert (
        "the vocabulary has no <|im_start|>, <|im_end|> of the template 'chatml'"
        in capsys.readouterr().out
    )


LEARNED = re.compile(r'<i class="[^"]*\bt\b[^"]*" [^>]*>(.*?)</i>', re.DOTALL)


def test_a_page_with_masks(main, options: list[str], tmp_path: Path, capsys) -> None:
    file = write(options, asked({'city': 'Paris'}), asked({}))
    page = tmp_path / 'calls.html'
    command = [str(PROJECT / 'configs' / 'internlm_tiny_agent.py'), '--html', str(page)]
    assert main([*command, '--rows', '2', *options]) == 1
    assert f'written: {page}' in capsys.readouterr().out
    text = page.read_text(encoding='utf-8')
    assert html.escape(f'{file}:2, message 1') in text and text.count('<article') == 2
    assert '<th>tool</th>' in text and '<td>spare</td><td>1</td><td>0</td>' in text
    learned = html.unescape(''.join(LEARNED.findall(text)))
    assert 'ActionInput:{"city": "Paris"}' in learned and 'blue' not in learned
    assert PLAIN[1]['content'] not in learned and PLAIN[2]['content'] in learned
    assert PLAIN[1]['content'] in html.unescape(re.sub('<[^>]*>', '', text))

    for wrong, error in (
        (tmp_path, f'error: --html {tmp_path} is a folder: name a file in it'),
        (tmp_path / 'no' / 'a.html', f'a.html: there is no folder {tmp_path / "no"}'),
    ):
        assert main([*command[:2], str(wrong), *options]) == 2
        assert error in capsys.readouterr().err

    file.write_text(file.read_text() + '\n{"messages": [')  # training would not read it
    assert main([*command, *options]) == 1
    text = page.read_text(encoding='utf-8')
    assert 'weather.jsonl:3: not JSON' in text and '<article' not in text


def test_what_cannot_be_read(main, options: list[str], capsys) -> None:
    nowhere = f'{options[2]}/nowhere'
    assert main([str(PROJECT / 'configs' / 'internlm2_7b_agent.py'), *options[:2], nowhere]) == 2
    assert 'error: ' in capsys.readouterr().err
    assert main(['internlm_tiny_pretrain']) == 2
    assert 'reads no conversations' in capsys.readouterr().err
    assert main(['internlm_tiny_sft', '--rows', '-1']) == 2
    assert '--rows -1: 0 or more' in capsys.readouterr().err
