"""The command that draws records."""

import json
from pathlib import Path

import pytest

from internlm_mm.__main__ import main
from tests.test_engine.test_benchmark_plots import RECORD


def test_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, out = tmp_path / 'a.json', tmp_path / 'a.png'
    record.write_text(json.dumps(RECORD))
    command = ['plot_benchmarks', str(record), str(record), '--labels', 'one', 'two']
    assert main([*command, '--out', str(out)]) == 0
    assert capsys.readouterr().out == f'{out}\n' and out.is_file()


def test_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / 'a.json'
    assert main(['plot_benchmarks', str(missing), '--out', str(tmp_path / 'a.png')]) == 2
    assert capsys.readouterr().err == f'error: there is no record {missing}\n'
