from pathlib import Path

import pytest

from internlm_mm.tokenizers import SentencePieceTokenizer
from internlm_mm.tokenizers.training import train_tokenizer

TEXTS = [
    'def add(first, second):\n\t"""Sum of two."""\n\treturn first + second\n',
    'The quick brown fox jumps over the lazy dog, 12345 times.\n\n    four spaces\n',
    'Der Fluß fließt über große Steine; 日本語のテキスト、中文也有。\n',
] * 8


@pytest.fixture(scope='session')
def trained(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    """A small tokenizer."""
    folder: Path = tmp_path_factory.mktemp('tokenizer')
    return train_tokenizer(TEXTS, folder, vocab_size=400)
