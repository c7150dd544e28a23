import json
from pathlib import Path

import pytest

from tests.conversations import PLAIN, internlm_model
from tools.browse_dataset import main


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    internlm_model(tmp_path / 'tokenizer')
    lines = [json.dumps({'messages': PLAIN})] * 3
    (tmp_path / 'c.jsonl').write_text('\n'.join(lines))
    return [
        '--cfg-options',
        f'tokenizer.path={tmp_path}/tokenizer',
        f'train_dataloader.dataset.path={tmp_path}/c.jsonl',
        f'train_dataloader.dataset.cache_dir={tmp_path}/cache',
        f'val_dataloader.dataset.path={tmp_path}/none.jsonl',
    ]


def test_rows(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['internlm_tiny_sft', '--rows', '1', *options]) == 0
    out = capsys.readouterr().out
    assert 'row 0 of' in out and '<|User|>:Hi<eoh>' in out and '<|Bot|>:Hello\nyou<eoa>' in out


def test_check(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['internlm_tiny_sft', '--check', *options]) == 0
    assert '3 conversations' in capsys.readouterr().out
    with open(tmp_path / 'c.jsonl', 'a') as file:
        file.write('\n' + json.dumps({'messages': PLAIN[:2]}))
    assert main(['internlm_tiny_sft', '--check', *options]) == 1
    assert 'c.jsonl:4, messages: there is nothing to learn' in capsys.readouterr().out


def test_what_cannot_be_read(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['internlm_tiny_sft', '--val', *options]) == 2
    assert 'none.jsonl' in capsys.readouterr().err
    assert main(['internlm_7b_speed']) == 2
    assert 'no tokenizer' in capsys.readouterr().err
    other = f'tokenizer.path={options[1].partition("=")[2]}'
    assert main(['internlm_7b_pretrain', '--check', '--cfg-options', other]) == 2
    assert '--check reads conversations' in capsys.readouterr().err
