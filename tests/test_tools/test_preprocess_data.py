import json
from pathlib import Path

import pytest

from internlm_mm.datasets import PretrainDataset
from internlm_mm.datasets.internlm_bin import read_bin
from internlm_mm.tokenizers.training import train_tokenizer
from tools.preprocess_data import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """A working folder with `texts`, `empty` and `tokenizer`."""
    (tmp_path / 'texts').mkdir()
    (tmp_path / 'empty').mkdir()
    texts = [f'the quick brown fox number {index}' for index in range(50)]
    lines = [json.dumps({'text': text}) for text in texts]
    (tmp_path / 'texts' / 'web.jsonl').write_text('\n'.join(lines))
    train_tokenizer(texts, tmp_path / 'tokenizer', vocab_size=290)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_writes_token_files(folder: Path, capsys) -> None:
    command = ['texts', '-o', 'out', '--tokenizer', 'tokenizer', '--num-workers', '1']
    assert main([*command, '--validation-fraction', '0.2', '--no-bos']) == 0
    for split in ('train', 'validation'):
        dataset = PretrainDataset(folder / 'out' / split, seq_len=16)
        assert dataset.domains == ['web']
        assert dataset.vocab_size == 290
    assert 'validation' in capsys.readouterr().out
    assert main(command) == 2
    assert 'out exists' in capsys.readouterr().err
    assert main([*command, '--overwrite']) == 0
    assert not (folder / 'out' / 'validation').exists()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['none', '--tokenizer', 'tokenizer'], 'error: no file or folder none'),
        (['empty', '--tokenizer', 'tokenizer'], 'error: empty has no file that ends in'),
        (['texts', '--tokenizer', 'none'], 'error: no tokenizer at none'),
        (['texts', '--tokenizer', 'empty'], 'error: empty holds neither'),
        (['texts', '--tokenizer', 'tokenizer', '--text-key', 'txt'], "Did you mean 'text'?"),
    ],
)
def test_mistakes_are_one_line(folder: Path, capsys, options: list[str], message: str) -> None:
    assert main([*options, '--output', 'out', '--num-workers', '0']) == 2
    assert message in capsys.readouterr().err
    assert not (folder / 'out').exists()


def test_bin_files_of_internlm(folder: Path, capsys) -> None:
    command = ['texts', '-o', 'out', '--tokenizer', 'tokenizer', '--num-workers', '0']
    assert main([*command, '--format', 'internlm']) == 0
    assert 'web' in capsys.readouterr().out
    assert len(list(read_bin(folder / 'out/train/web/dataset.bin'))) == 50
    (folder / 'chat.jsonl').write_text('{"prompt": "the quick", "answer": "brown fox"}')
    command = ['chat.jsonl', '-o', 'chat', '--tokenizer', 'tokenizer']
    assert main([*command, '--chat-template', 'internlm']) == 2
    assert '--chat-template is for --format internlm' in capsys.readouterr().err
    options = ['--chat-template', 'internlm', '--max-length', '300']
    assert main([*command, '--format', 'internlm', *options]) == 0
    (sample,) = read_bin(folder / 'chat/train/chat/dataset.bin')
    assert 0 < sample.loss_mask.sum() < len(sample.ids)


def test_help_has_examples(capsys) -> None:
    with pytest.raises(SystemExit):
        main(['--help'])
    assert '--validation-inputs held_out/' in capsys.readouterr().out
