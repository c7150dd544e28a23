"""The command that measures perplexity."""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from tests.helpers import TINY, tiny_runner
from tests.questions import write_jsonl
from tests.trained import trained_run

TOOL = Path(__file__).parents[2] / 'tools' / 'test.py'


def run_tool(*arguments: object) -> int:
    spec = spec_from_file_location('perplexity_tool', TOOL)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules.pop('perplexity_tool', None)
    spec.loader.exec_module(module)
    return module.main([str(argument) for argument in arguments])


@pytest.fixture
def checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture) -> Path:
    hook = dict(type='StepCheckpointHook')
    tiny_runner(tmp_path, default_hooks__checkpoint=hook, train_cfg__max_iters=1).train()
    capsys.readouterr()
    return tmp_path / 'iter_1'


def test_one_line_of_json(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    assert run_tool(checkpoint, '--json') == 0
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert result['weights'] == str(checkpoint)
    assert result.keys() == {'weights', 'loss', 'perplexity', 'token_accuracy'}


def test_tasks_with_warnings_and_records(tmp_path: Path, capsys) -> None:
    work_dir, _, _ = trained_run(tmp_path / 'run', max_seq_len=64)
    rows = [{'question': 'x', 'options': ['1', '2'], 'answer': 0}, {'question': 'y'}]
    data = write_jsonl(tmp_path / 'mine.jsonl', rows)
    task = dict(type='MultipleChoice', path=str(data), format='options', on_error='skip')
    task |= dict(shots=1, shots_from=str(write_jsonl(tmp_path / 'shots.jsonl', rows[:1] * 2)))
    task |= dict(prompt={'intro': 'def f(x): ' * 7})
    config = tmp_path / 'tasks.py'
    config.write_text(f"val_cfg = dict(type='PerplexityLoop', tasks=[{task!r}])\n")
    output = tmp_path / 'out'
    assert run_tool(config, work_dir, '--json', '--output', output) == 0
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    assert json.loads(line).keys() == {'weights', 'options/accuracy'}
    assert "1 questions left out by on_error='skip'" in captured.err
    assert '1 of 1 prompts have fewer than 1 examples' in captured.err
    names = sorted(path.name for path in output.iterdir())
    assert names == ['metrics.json', 'options.jsonl', 'tasks.json']
    assert json.loads((output / 'metrics.json').read_text()) == json.loads(line)


def test_a_table(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    options = ['--cfg-options', 'val_dataloader.max_rows=2', 'strategy.attention=reference']
    assert run_tool(TINY, '--checkpoint', checkpoint, *options) == 0
    path, header, row = capsys.readouterr().out.splitlines()
    assert path == str(checkpoint) and header.split() == [
        'domain',
        'loss',
        'perplexity',
        'token_accuracy',
    ]
    assert row.split()[0] == 'all'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([TINY], 'has no weights: give some with --checkpoint'),
        ([TINY, 'somewhere', '--checkpoint', 'nowhere'], 'somewhere and nowhere'),
        (['nowhere'], 'nowhere is neither a checkpoint nor a Hugging Face folder'),
        ([TINY, '--checkpoint', 'nowhere'], 'nowhere'),
        ([TINY, '--cfg-options', 'model'], "'model' is not of the form a.b=value"),
    ],
)
def test_wrong_input(arguments, message: str, capsys: pytest.CaptureFixture) -> None:
    assert run_tool(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith('error: ') and message in captured.err
    assert captured.out == ''
