"""Tokenizers in Hugging Face's format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internlm_mm.registry import TOKENIZERS
from internlm_mm.tokenizers.base import SOURCE_HASH, Tokenizer, hash_files
from internlm_mm.tokenizers.sentencepiece_tokenizer import (
    MODEL_NAME,
    SPACE_MARK_BYTES,
    encode_around_marks,
)

JSON_NAME = 'tokenizer.json'
_FILES = (
    JSON_NAME,
    'tokenizer_config.json',
    'special_tokens_map.json',
    'added_tokens.json',
    'chat_template.jinja',
    MODEL_NAME,
    'vocab.json',
    'merges.txt',
)


def read_hf_tokenizer(folder: str | Path) -> Any:
    """What `AutoTokenizer` makes of a folder; code that lies in the folder is not run.

    Where the folder has code, for its model or its tokenizer, AutoTokenizer would ask at the
    terminal whether to run it, even where the tokenizer is a plain one.

    Raises:
        ValueError: If a file is damaged; names it.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    files = [Path(folder) / name for name in ('config.json', 'tokenizer_config.json')]
    has_code = any('auto_map' in _read_table(file) for file in files if file.is_file())
    reader = PreTrainedTokenizerFast if has_code else AutoTokenizer
    try:
        return reader.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # plain ones, too, of the library that reads tokenizer.json
        raise _damaged(Path(folder), error) from error


def _read_table(file: Path) -> dict[str, Any]:
    try:
        said = json.loads(file.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{file} is truncated or damaged: {error}') from error
    if not isinstance(said, dict):
        raise ValueError(f'{file} is truncated or damaged: it holds no table')
    return said


def _damaged(folder: Path, error: Exception) -> ValueError:
    first = str(error).strip().split('\n')[0] or type(error).__name__
    return ValueError(f'{folder}: {JSON_NAME} or tokenizer_config.json is damaged: {first}')


@TOKENIZERS.register_module()
class HFTokenizer(Tokenizer):
    """A tokenizer of Hugging Face `transformers`, from a local folder; nothing is downloaded.

    Args:
        path: Folder with `tokenizer.json`, and `tokenizer_config.json` for the special tokens.

    Raises:
        FileNotFoundError: If the folder has no `tokenizer.json`.
        ValueError: If a file is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        # Importing transformers takes seconds; a run with a SentencePiece model need not wait.
        from transformers import PreTrainedTokenizerFast

        path = Path(path)
        self.path = path.parent if path.name == JSON_NAME else path
        if not (self.path / JSON_NAME).is_file():
            raise FileNotFoundError(
                f'no Hugging Face tokenizer at {self.path}: {JSON_NAME} is missing'
            )
        if (self.path / 'tokenizer_config.json').is_file():
            self._tokenizer = read_hf_tokenizer(self.path)
        else:
            try:
                self._tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(self.path / JSON_NAME))
            except Exception as error:  # as above
                raise _damaged(self.path, error) from error
        self._vocab: dict[str, int] = self._tokenizer.get_vocab()
        self.vocab_size = max(self._vocab.values()) + 1  # ids may have holes
        self.bos_id = self._tokenizer.bos_token_id
        self.eos_id = self._tokenizer.eos_token_id
        self.pad_id = self._tokenizer.pad_token_id
        self._files = [self.path / name for name in _FILES if (self.path / name).is_file()]
        source = self._source_hash()
        self.hash = source or hash_files(self._files)
        marks = [self._vocab.get(name) for name in SPACE_MARK_BYTES]
        known = [index for index in marks if index is not None]
        # Of a conversion only: elsewhere U+2581 is a character like others.
        self._mark_ids = known if source and len(known) == len(marks) else None

    def _source_hash(self) -> str | None:
        """Hash of the SentencePiece model this was converted from: the ids are the same."""
        config, model = self.path / 'tokenizer_config.json', self.path / MODEL_NAME
        if not (config.is_file() and model.is_file()):
            return None
        source = hash_files([model], MODEL_NAME)
        return source if json.loads(config.read_text()).get(SOURCE_HASH) == source else None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens; text that spells one is plain text."""

        def encode(part: str) -> list[int]:
            return self._tokenizer.encode(part, add_special_tokens=False, split_special_tokens=True)

        return encode_around_marks(encode, text, self._mark_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens are written out."""
        text = self._tokenizer.decode(
            [int(index) for index in ids],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        assert isinstance(text, str)  # a list only for a list of lists
        return text

    def token_id(self, token: str) -> int | None:
        """Id of the token that is called `token`."""
        return self._vocab.get(token)

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files to `folder`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for path in self._files:
            shutil.copyfile(path, Path(folder) / path.name)
