"""`tools/print_config.py`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from internlm_mm.__main__ import main as command
from internlm_mm.utils.config import load_config, to_plain

Write = Callable[[str, str], Path]


@pytest.fixture
def config(write: Write) -> Path:
    return write(
        'a.py',
        """\
        with read_base():
            from internlm_mm.configs._base_.models.internlm_7b import *
        model.update(num_layers=2)
        """,
    )


def run(*arguments: object) -> int:
    return command(['print_config', *map(str, arguments)])


def test_prints_python_that_loads_again(
    config: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, '--cfg-options', 'model.num_layers=3') == 0
    again = load_config(write('b.py', capsys.readouterr().out))
    expected = load_config(config, {'model.num_layers': 3})
    assert to_plain(again._cfg_dict) == to_plain(expected._cfg_dict)


def test_prints_json(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config, '--json') == 0
    assert json.loads(capsys.readouterr().out)['model']['num_layers'] == 2


def test_explains(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config, '--explain', 'model.num_layers', '--cfg-options', 'model.num_layers=5') == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.endswith('num_layers=32,  -> 32') and 'internlm_7b.py:' in first
    assert second == f'{config}:3: model.update(num_layers=2)  -> 2'
    assert third == '--cfg-options: model.num_layers=5'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--cfg-options', 'model.num_layer=1'], "Did you mean 'num_layers'?"),
        (['--cfg-options', 'nonsense'], "--cfg-options 'nonsense' is not of the form a.b=value"),
        (['--explain', 'model.num_layer'], "the config has no 'model.num_layer'"),
    ],
)
def test_what_is_wrong_is_said(
    config: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and message in error
