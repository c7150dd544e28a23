"""`python -m internlm_mm COMMAND`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from internlm_mm.__main__ import commands, main, tools_folder
from internlm_mm.utils.launch import free_port


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


def test_an_unknown_command_is_told_without_torch() -> None:
    code = (
        'import sys; from internlm_mm.__main__ import main; main(["tran"]); '
        'sys.exit("torch" in sys.modules)'
    )
    subprocess.run([sys.executable, '-c', code], check=True, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_an_unknown_command_is_told_once_for_a_job() -> None:
    command = [sys.executable, '-m', 'internlm_mm', 'tran', 'x.py']
    place = {'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port())}
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ | place | {'RANK': str(rank), 'LOCAL_RANK': str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = ''.join(rank.communicate(timeout=120)[1] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert printed.count("error: no command 'tran'. Did you mean 'train'?") == 1


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
