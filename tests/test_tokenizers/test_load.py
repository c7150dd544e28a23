from pathlib import Path

import pytest

from internlm_mm.tokenizers import HFTokenizer, SentencePieceTokenizer, load_tokenizer
from internlm_mm.tokenizers.convert import write_hf_tokenizer


def test_finds_out_what_a_path_holds(trained: SentencePieceTokenizer, tmp_path: Path) -> None:
    for path in (trained.path, trained.path.parent):
        assert isinstance(load_tokenizer(path), SentencePieceTokenizer)
    write_hf_tokenizer(trained.path, tmp_path)
    trained.save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), HFTokenizer)
    assert isinstance(load_tokenizer(tmp_path / 'tokenizer.json'), HFTokenizer)
    assert isinstance(load_tokenizer(tmp_path / 'tokenizer.model'), SentencePieceTokenizer)


def test_missing_path_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match='train_tokenizer'):
        load_tokenizer(tmp_path / 'none')


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='neither'):
        load_tokenizer(tmp_path)
