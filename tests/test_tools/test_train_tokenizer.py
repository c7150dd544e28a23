from pathlib import Path

import pytest

from internlm_mm.tokenizers import load_tokenizer
from tools.train_tokenizer import main


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / 'text.txt'
    path.write_text('the quick brown fox jumps over the lazy dog\n' * 20)
    return path


def test_writes_a_tokenizer(text: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / 'tokenizer'
    options = ['--output', str(out), '--vocab-size', '300', '--symbols', '<|im_end|>']
    assert main([str(text), *options]) == 0
    tokenizer = load_tokenizer(out)
    assert tokenizer.decode(tokenizer.encode(' the\n\tfox')) == ' the\n\tfox'
    assert len(tokenizer.encode('<|im_end|>')) == 1
    assert '300 ids' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('inputs', 'vocab_size', 'message'),
    [
        (['none'], '300', 'error: no file or folder none'),
        (['empty'], '300', 'error: empty has no file that ends in .txt'),
        (['text.txt'], '9999', 'at most'),
    ],
)
def test_mistakes_are_one_line(
    text: Path, tmp_path: Path, monkeypatch, capsys, inputs: list, vocab_size: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    assert main([*inputs, '-o', 'out', '--vocab-size', vocab_size]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1
    assert not (tmp_path / 'out').exists()


def test_existing_output(text: Path, tmp_path: Path, capsys) -> None:
    command = [str(text), '-o', str(tmp_path / 'x.model'), '--vocab-size', '290']
    assert [main(command), main(command), main([*command, '--overwrite'])] == [0, 2, 0]
    assert 'exists' in capsys.readouterr().err


def test_help_has_examples(capsys) -> None:
    with pytest.raises(SystemExit):
        main(['--help'])
    assert 'python tools/train_tokenizer.py texts/' in capsys.readouterr().out
