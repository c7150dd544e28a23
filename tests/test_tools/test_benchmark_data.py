import json
from pathlib import Path

import pytest

from internlm_mm.__main__ import main
from internlm_mm.engine.benchmark_data import judge


def test_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = tmp_path / 'texts.jsonl'
    lines = [json.dumps({'text': f'the text of number {i}, ' * 20}) for i in range(50)]
    texts.write_text('\n'.join(lines) + '\n')
    monkeypatch.setattr('internlm_mm.engine.benchmark_data.TARGETS', ())
    command = ['benchmark_data', '--texts', str(texts), '--turns', '1', '--files', '3']
    command += ['--tokens-per-file', '5000', '--megabytes', '1', '--seconds', '0.01', '--json']
    command += ['--tokenizer', str(make_tokenizer(tmp_path))]
    capsys.readouterr()
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report['opening']['tokens'] == 15_000 and judge(report) == []
    (record,) = (tmp_path / 'work_dirs' / 'benchmarks').glob('data_*.json')
    assert json.loads(record.read_text())['command'] == ['tools/benchmark_data.py', *command[1:]]


def test_a_part_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ['benchmark_data', '--parts', 'saving', '--turns', '1', '--megabytes', '1']
    assert main([*command, '--json', '--no-records']) in (0, 1)
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {'saving', 'command'} and report['saving']['megabytes'] == 1
    with pytest.raises(SystemExit):
        main(['benchmark_data', '--parts', 'savings'])
    assert 'opening' in capsys.readouterr().err  # what there is


def make_tokenizer(folder: Path) -> Path:
    path = folder / 'tokenizer'
    command = ['train_tokenizer', str(folder / 'texts.jsonl'), '--output', str(path)]
    assert main([*command, '--vocab-size', '300']) == 0
    return path
