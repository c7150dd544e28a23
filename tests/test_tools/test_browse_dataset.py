import json
from pathlib import Path

import pytest

from internlm_mm.datasets.internlm_bin import samples_of, write_bin
from internlm_mm.datasets.token_file import TokenFile
from internlm_mm.datasets.token_writer import TokenFileWriter
from internlm_mm.tokenizers import load_tokenizer
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


def test_what_becomes_of_tokens(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(['internlm_tiny_sft', '--rows', '0', *options]) == 0
    out = capsys.readouterr().out
    for word in ('records', 'used', 'padding', 'tokens a document', 'packing=None would make 3'):
        assert word in out


def test_page(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = [{'role': 'user', 'content': '<script>alert(1)</script>'}, PLAIN[2]]
    with open(tmp_path / 'c.jsonl', 'a') as file:
        file.write('\n' + json.dumps({'messages': evil}))
    page = tmp_path / 'page.html'
    assert main(['internlm_tiny_sft', '--html', str(page), '--rows', '1', *options]) == 0
    out = capsys.readouterr().out
    assert f'written: {page}' in out and 'row 0 of' not in out
    text = page.read_text(encoding='utf-8')
    for word in ('ConversationDataset', 'messages by role', 'row 0, c:', '4 conversations'):
        assert word in text
    assert text.count('<script>') == 1 and 'alert(1)' not in text.partition('<article')[0]


def test_page_of_problems(options: list[str], tmp_path: Path) -> None:
    with open(tmp_path / 'c.jsonl', 'a') as file:
        file.write('\n{"messages": [')
    page = tmp_path / 'page.html'
    command = ['internlm_tiny_sft', '--html', str(page), *options]
    assert main(command) == 2 and not page.exists()  # as training would
    assert main([*command[:3], '--check', *options]) == 1
    text = page.read_text(encoding='utf-8')
    assert 'c.jsonl:4: not JSON' in text and '<article' not in text


def test_data_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ['--rows', '1', '--cfg-options']
    small = [f'train_dataloader.dataset.{k}={v}' for k, v in dict(seq_len=8, num_rows=5).items()]
    assert main(['internlm_7b_speed', *options, *small]) == 0
    assert '[8 tokens, 7 learned' in capsys.readouterr().out
    assert main(['internlm_7b_speed', '--check']) == 2
    assert 'data of RandomTokens cannot be checked' in capsys.readouterr().err


def test_data_of_every_kind(options: list[str], tmp_path: Path, capsys) -> None:
    """Pretraining, packed `.bin` files and pairs are shown, checked and put on a page alike."""
    tokenizer = load_tokenizer(tmp_path / 'tokenizer')
    with TokenFileWriter(tmp_path / 'tokens/web', vocab_size=tokenizer.vocab_size) as writer:
        writer.add([tokenizer.bos_id, *tokenizer.encode('def f(x)'), tokenizer.eos_id])
    write_bin(tmp_path / 'bins/en/a.bin', samples_of(TokenFile(tmp_path / 'tokens/web')))
    pair = {'prompt': 'q', 'chosen': 'def yes', 'rejected': 'def no'}
    (tmp_path / 'pairs.jsonl').write_text(json.dumps(pair))
    kinds = {
        'PretrainDataset': (dict(data_root='tokens'), '<bos>def f(x)<eos>'),
        'InternLMBinDataset': (
            dict(data_root='bins', vocab_size=tokenizer.vocab_size),
            '<bos>def f(x)<eos>',
        ),
        'PreferenceDataset': (
            dict(path='pairs.jsonl', chat_template='internlm2'),
            'rejected: ',
        ),
    }
    for name, (places, word) in kinds.items():
        config = tmp_path / f'{name.lower()}.py'
        places = {
            k: str(tmp_path / v) if k in ('data_root', 'path') else v for k, v in places.items()
        }
        if name != 'PretrainDataset':
            places['cache_dir'] = str(tmp_path / 'cache')
        config.write_text(
            'from mmengine.config import read_base\n'
            'with read_base():\n'
            '    from internlm_mm.configs.internlm_tiny_sft import *\n'
            f'tokenizer.update(path={str(tmp_path / "tokenizer")!r})\n'
            'train_dataloader.dataset = dict('
            f'type="internlm_mm.datasets.{name}", seq_len=256, **{places!r})\n'
        )
        page = tmp_path / 'page.html'
        assert main([str(config), '--rows', '1']) == 0
        assert word in capsys.readouterr().out
        assert main([str(config), '--check']) == 0
        assert '; 0 problems' in capsys.readouterr().out
        assert main([str(config), '--html', str(page), '--rows', '1']) == 0
        assert name in page.read_text() and '<article' in page.read_text()


def test_what_cannot_be_read(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['internlm_tiny_sft', '--val', *options]) == 2
    assert 'none.jsonl' in capsys.readouterr().err
    assert main(['internlm_7b_speed', '--val']) == 2
    assert 'has no val_dataloader' in capsys.readouterr().err
    assert main(['internlm_tiny_sft', '--first', '-1', *options]) == 2
    assert '--rows 2 --first -1: both count from 0' in capsys.readouterr().err
    for page, text in (
        ('.', 'error: --html . is a folder: name a file in it'),
        ('no/where.html', 'error: --html no/where.html: there is no folder no'),
    ):
        assert main(['internlm_tiny_sft', '--html', page, *options]) == 2
        assert text in capsys.readouterr().err
