"""`python -m internlm_mm COMMAND`."""

import subprocess
import sys
from pathlib import Path

import pytest

from internlm_mm.__main__ import commands, main, tools_folder


def test_lists_every_tool(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    for file in tools_folder().glob('*.py'):
        assert (f'  {file.stem} ' in printed) == ('main(' in file.read_text())
    assert all(line.endswith('.') for line in commands().values())


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['print_confg']) == 2
    assert capsys.readouterr().err == (
        "error: no command 'print_confg'. Did you mean 'print_config'?\n"
    )


def test_runs_a_tool_from_anywhere(tmp_path: Path) -> None:
    config = tmp_path / 'a.py'
    config.write_text(
        'with read_base():\n    from internlm_mm.configs._base_.models.internlm_7b import *\n'
    )
    command = [sys.executable, '-m', 'internlm_mm', 'print_config', 'a.py']
    root = str(Path(__file__).parents[1])
    run = subprocess.run(
        command, cwd=tmp_path, env={'PYTHONPATH': root}, capture_output=True, text=True, check=True
    )
    assert "type='internlm_mm.models.InternLM'" in run.stdout


def test_passes_mistakes_on(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ['print_config', 'internlm_7b_pretrain', '--cfg-options', 'model.num_layer=1']
    assert main(argv) == 2
    assert "model.num_layer=1: InternLM has no option 'num_layer'" in capsys.readouterr().err


def test_passes_the_exit_code_on() -> None:
    assert main(['print_config', 'no_such_config_anywhere']) == 2
