"""Writing token files; what is in one is described in `internlm_mm.datasets.token_file`."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

import numpy as np

from internlm_mm.datasets.token_file import VERSION, offsets_header
from internlm_mm.utils.publish import publish

WINDOWS = tuple(2**power for power in range(7, 18))
"""Lengths, in tokens, for which the writer counts how many documents may start within."""

_CHUNK = 1 << 20  # documents looked at together


class TokenFileWriter:
    """Writes a token file into a temporary folder beside it and moves it into place when done.

    Used as a context manager: leaving normally publishes, leaving by an exception removes what was
    written and leaves an older file at `path` as it was.

    Args:
        path: The folder to make.
        vocab_size: Ids must be below it; decides between uint16 and uint32.
        tokenizer: What made the ids: `dict(type=..., hash=...)`.
        has_loss_mask: Whether documents come with a loss mask.
        overwrite: Replace a token file that is there already.

    Raises:
        FileExistsError: If `path` exists and `overwrite` is not set.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        vocab_size: int,
        tokenizer: dict[str, str] | None = None,
        has_loss_mask: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        if not 1 <= vocab_size <= 2**32:
            raise ValueError(f'vocab_size must be between 1 and 2**32, got {vocab_size}')
        if self.path.exists() and not overwrite:
            raise FileExistsError(f'{self.path} exists')
        if self.path.exists() and not (self.path / 'meta.json').is_file():
            raise FileExistsError(f'{self.path} is no token file, so it is not overwritten')
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.dtype = np.dtype('<u2' if vocab_size <= 2**16 else '<u4')
        self.num_documents = 0
        self.num_tokens = 0
        self._shortest: int | None = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._folder = Path(
            tempfile.mkdtemp(prefix=f'.{self.path.name}.', suffix='.partial', dir=self.path.parent)
        )
        self._folder.chmod(0o755)  # mkdtemp makes it private, and the data is meant to be shared
        self._tokens = open(self._folder / 'tokens.bin', 'wb')
        self._mask = open(self._folder / 'loss_mask.bin', 'wb') if has_loss_mask else None
        # Offsets go to disk as they come: a billion documents would not fit in memory.
        self._offsets = open(self._folder / 'offsets.npy', 'wb')
        self._offsets.write(offsets_header(0) + bytes(8))

    def add(self, ids: np.ndarray | list[int], loss_mask: np.ndarray | None = None) -> None:
        """Append one document.

        Args:
            ids: Its tokens, [tokens], at least one.
            loss_mask: 1 where a token is to be learned, [tokens]; needed iff `has_loss_mask`.

        Raises:
            ValueError: If it is empty, has an id outside the vocabulary, or lacks its mask.
        """
        array = np.asarray(ids, np.int64)
        self.add_many(array, np.array([len(array)]), loss_mask)

    def add_many(
        self, ids: np.ndarray, lengths: np.ndarray, loss_mask: np.ndarray | None = None
    ) -> None:
        """Append several documents that lie end to end.

        Args:
            ids: Their tokens, [tokens].
            lengths: Tokens of each, [documents].
            loss_mask: As in `add`, for all of them, [tokens].
        """
        if not len(lengths):
            return
        if lengths.min() < 1 or lengths.sum() != len(ids):
            raise ValueError(f'documents of {lengths.tolist()} tokens do not make {len(ids)}')
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f'token id {bad} is outside the vocabulary of {self.vocab_size}')
        if (loss_mask is None) != (self._mask is None):
            raise ValueError('every document needs a loss mask, or none may have one')
        if self._mask is not None and loss_mask is not None:
            if len(loss_mask) != len(ids):
                raise ValueError(f'{len(loss_mask)} mask values for {len(ids)} tokens')
            self._mask.write(np.asarray(loss_mask, np.uint8).tobytes())
        self._tokens.write(ids.astype(self.dtype).tobytes())
        self._offsets.write((self.num_tokens + np.cumsum(lengths)).astype('<i8').tobytes())
        self.num_documents += len(lengths)
        self.num_tokens += len(ids)
        shortest = int(lengths.min())
        self._shortest = min(shortest, self._shortest or shortest)

    def __enter__(self) -> TokenFileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def close(self) -> None:
        """Write what is left and publish."""
        try:
            self._offsets.seek(0)
            self._offsets.write(offsets_header(self.num_documents + 1))
            self._close_files()
            self._write_meta()
            publish(self._folder, self.path)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Remove everything that was written."""
        self._close_files()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _close_files(self) -> None:
        for file in (self._tokens, self._offsets, self._mask):
            if file is not None:
                file.close()

    def _write_meta(self) -> None:
        offsets = np.load(self._folder / 'offsets.npy', mmap_mode='r')
        meta = {
            'version': VERSION,
            'dtype': self.dtype.name,
            'num_documents': self.num_documents,
            'num_tokens': self.num_tokens,
            'vocab_size': self.vocab_size,
            'tokenizer': self.tokenizer,
            'shortest_document': self._shortest or 0,
            'documents_per_window': {str(w): _most_starts(offsets, w) for w in WINDOWS},
        }
        (self._folder / 'meta.json').write_text(json.dumps(meta, indent=2) + '\n')


def _most_starts(offsets: np.ndarray, window: int) -> int:
    """Most documents that start within any `window` consecutive tokens."""
    most, count = 0, len(offsets) - 1
    for start in range(0, count, _CHUNK):
        chunk = offsets[start : min(start + _CHUNK, count)]
        # offsets[-1] is the end of the data and starts no document
        last = np.searchsorted(offsets[:-1], chunk + window)
        most = max(most, int((last - np.arange(start, start + len(chunk))).max()))
    return most
