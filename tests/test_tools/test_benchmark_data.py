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


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ('--turns 0', '--turns 0: must be at least 1'),
        ('--files 0', '--files 0: must be at least 1'),
        ('--megabytes -5 --parts saving', '--megabytes -5: must be at least 1'),
        (
            '--megabytes 10000000 --parts saving',
            '--megabytes 10000000: more than memory has left, ',
        ),
        ('--tokens-per-file 5', '--tokens-per-file 5: must be a multiple of 1,000, at least 1,000'),
        (
            '--files 4 --tokens-per-file 1000',
            '--files 4 --tokens-per-file 1000: together they need 4,096 tokens, which is one row',
        ),
        ('--seconds -1', '--seconds -1: must be more than 0, and end'),
        ('--seconds inf', '--seconds inf: must be more than 0, and end'),
        ('--folder FOLDER/nowhere', '--folder FOLDER/nowhere: no such folder'),
        ('--folder FOLDER/empty.txt', '--folder FOLDER/empty.txt: is no folder'),
        ('--folder /proc', '--folder /proc: cannot be written: No such file or directory'),
        (
            '--records FOLDER/empty.txt/x',
            '--records FOLDER/empty.txt/x: FOLDER/empty.txt is no folder',
        ),
        ('--texts FOLDER/nowhere.txt', '--texts: no file FOLDER/nowhere.txt'),
        ('--texts FOLDER/nowhere', '--texts: no file FOLDER/nowhere'),
        ('--texts FOLDER/empty.txt', '--texts: FOLDER/empty.txt has no text'),
        ('--tokenizer FOLDER/nowhere', '--tokenizer: no tokenizer at FOLDER/nowhere; `python '),
    ],
)
def test_what_cannot_be_measured_or_kept_is_refused_first(
    options: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty.txt').touch()
    words = options.replace('FOLDER', str(tmp_path)).split()
    assert main(['benchmark_data', *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f'error: {message}'.replace('FOLDER', str(tmp_path)))
    assert captured.err.count('\n') == 1 and not captured.out
    assert [path.name for path in tmp_path.iterdir()] == ['empty.txt']


def test_records_are_kept_or_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match='2'):
        main(['benchmark_data', '--records', 'work_dirs/benchmarks', '--no-records'])
    assert '--no-records: not allowed with argument --records' in capsys.readouterr().err


def make_tokenizer(folder: Path) -> Path:
    path = folder / 'tokenizer'
    command = ['train_tokenizer', str(folder / 'texts.jsonl'), '--output', str(path)]
    assert main([*command, '--vocab-size', '300']) == 0
    return path
