"""Which tokenizer a path holds."""

from __future__ import annotations

from pathlib import Path

from internlm_mm.tokenizers.base import Tokenizer
from internlm_mm.tokenizers.hf_tokenizer import JSON_NAME, HFTokenizer
from internlm_mm.tokenizers.sentencepiece_tokenizer import MODEL_NAME, SentencePieceTokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read the tokenizer at `path`.

    Args:
        path: A SentencePiece `.model` file, a `tokenizer.json`, or a folder that holds
            `tokenizer.json` or `tokenizer.model` (the former wins: it knows added tokens).

    Raises:
        FileNotFoundError: If there is nothing at `path`.
        ValueError: If what is there is no tokenizer.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f'no tokenizer at {path}; `python tools/train_tokenizer.py` makes one, '
            'or give a .model file or the folder of a Hugging Face tokenizer'
        )
    if path.name == JSON_NAME or (path / JSON_NAME).is_file():
        return HFTokenizer(path)
    if path.is_file() or (path / MODEL_NAME).is_file():
        return SentencePieceTokenizer(path)
    raise ValueError(f'{path} holds neither {JSON_NAME} nor {MODEL_NAME}, so it is no tokenizer')
