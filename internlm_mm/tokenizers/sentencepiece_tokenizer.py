"""Tokenizers trained with SentencePiece, InternLM's own among them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from internlm_mm.registry import TOKENIZERS
from internlm_mm.tokenizers.base import Tokenizer, hash_files

MODEL_NAME = 'tokenizer.model'
_SPACE_MARK = '\u2581'  # how SentencePiece spells a space inside its pieces
SPACE_MARK_BYTES = tuple(f'<0x{byte:02X}>' for byte in _SPACE_MARK.encode())
"""Pieces that spell it in bytes."""


@TOKENIZERS.register_module()
class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    Args:
        path: A `.model` file, or a folder that holds `tokenizer.model`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a SentencePiece model.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.path = path / MODEL_NAME if path.is_dir() else path
        if not self.path.is_file():
            raise FileNotFoundError(f'no SentencePiece model at {self.path}')
        try:
            self._model = SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f'{self.path} is not a SentencePiece model: {error}') from error
        self.vocab_size = self._model.vocab_size()
        # SentencePiece says -1 for what a model does not have.
        self.bos_id, self.eos_id, self.pad_id = (
            None if index < 0 else index
            for index in (self._model.bos_id(), self._model.eos_id(), self._model.pad_id())
        )
        self.hash = hash_files([self.path], MODEL_NAME)  # also of `my.model`: checkpoints rename it
        mark = [self._model.piece_to_id(name) for name in SPACE_MARK_BYTES]
        self._mark_ids = mark if all(self._model.is_byte(index) for index in mark) else None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        return encode_around_marks(self._model.encode, text, self._mark_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens have none."""
        return self._model.decode([int(index) for index in ids])

    def token_id(self, token: str) -> int | None:
        """Id of the piece that is called `token`."""
        index = self._model.piece_to_id(token)
        return index if self._model.id_to_piece(index) == token else None

    def save(self, folder: str | Path) -> None:
        """Copy the model to `folder/tokenizer.model`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.path, Path(folder) / MODEL_NAME)


def encode_around_marks(
    encode: Callable[[str], list[int]], text: str, mark_ids: Sequence[int] | None
) -> list[int]:
    """Encode a text in which a literal U+2581 stays one; it would come back as a space.

    Args:
        encode: Of SentencePiece, or of what was converted from it.
        text: Any text.
        mark_ids: The pieces of `SPACE_MARK_BYTES`; None where there are none, and spaces come back.
    """
    if _SPACE_MARK not in text or mark_ids is None:
        return encode(text)
    first, *rest = text.split(_SPACE_MARK)
    ids = encode(first)
    for part in rest:
        ids += mark_ids
        ids += encode(part)
    return ids
