"""The interface every tokenizer has, and how one is found from a path."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

SOURCE_HASH = 'sentencepiece_hash'
"""Key of tokenizer_config.json: hash of the model that tokenizer.json was made from."""


class Tokenizer(ABC):
    """Text to token ids and back.

    Special tokens are never made from text: a document that spells `</s>` cannot end itself.
    Whoever builds a sequence adds `bos_id` and `eos_id` on purpose.

    Attributes:
        vocab_size: Ids are in `range(vocab_size)`.
        bos_id: Begins a document; None where the tokenizer has none.
        eos_id: Ends a document; None where the tokenizer has none.
        pad_id: Fills up; None where the tokenizer has none.
        hash: sha256 of the files it was read from, in hexadecimal. Token files and checkpoints
            store it, so that data made with another vocabulary is noticed.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    hash: str

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; for ids that came from `encode` the very text they came from."""

    def token_id(self, token: str) -> int | None:  # noqa: ARG002
        """Id of the token that is called `token`, to be put in on purpose; None if there is none.

        Text never becomes a special token, so this is how chat templates get theirs.
        """
        return None

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Copy the files to `folder`, so that `load_tokenizer(folder)` equals this one."""


def hash_files(paths: Iterable[Path], name: str | None = None) -> str:
    """Hash names and contents of files, in the order given.

    Args:
        paths: Files; their folders do not count.
        name: Taken for the files' own names, where a copy may be called otherwise.

    Returns:
        sha256 in hexadecimal.
    """
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f'{name or path.name}\0{len(content)}\0'.encode())
        digest.update(content)
    return digest.hexdigest()
