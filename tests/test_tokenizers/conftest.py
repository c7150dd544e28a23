from pathlib import Path

import pytest

from internlm_mm.checkpoint.huggingface import write_tokenizer
from internlm_mm.tokenizers import HFTokenizer, SentencePieceTokenizer, build_template
from internlm_mm.tokenizers.training import train_tokenizer
from tests.conversations import NAMES, byte_level, internlm_model

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


@pytest.fixture(scope='session')
def internlm_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    """A small tokenizer with the pieces that InternLM's chat templates use."""
    return internlm_model(tmp_path_factory.mktemp('internlm'))


@pytest.fixture(scope='session')
def byte_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> HFTokenizer:
    """A small tokenizer with the special tokens of Llama 3 and Qwen."""
    return byte_level(tmp_path_factory.mktemp('bytes'))


@pytest.fixture(scope='session')
def exported(
    tmp_path_factory: pytest.TempPathFactory,
    internlm_vocabulary: SentencePieceTokenizer,
    byte_vocabulary: HFTokenizer,
) -> dict[str, Path]:
    """For each template a folder as an export writes it."""
    folders = {}
    for name in NAMES:
        folders[name] = tmp_path_factory.mktemp(name)
        tokenizer = internlm_vocabulary if name.startswith('internlm') else byte_vocabulary
        write_tokenizer(tokenizer, folders[name], chat_template=build_template(name))
    return folders
