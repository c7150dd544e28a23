"""Token files: documents as one long memory-mapped array of ids, read; `token_writer` makes them.

A token file is a folder:

    tokens.bin     ids of all documents end to end, uint16 or uint32, little endian
    offsets.npy    where each document starts, and the end of the last, in tokens: int64
                   [documents + 1]
    loss_mask.bin  optional: 1 where a token is to be learned, 0 where it is context only, uint8
    meta.json      version, dtype, counts, vocabulary, tokenizer, and what bounds a row's documents
"""

from __future__ import annotations

import json
import mmap
import os
from functools import cached_property
from pathlib import Path

import numpy as np

VERSION = 1

_CHUNK = 1 << 20  # documents or tokens read at a time
_MAPS = ('tokens', 'offsets', 'loss_mask')  # what `TokenFile` maps when it is first asked for it


class TokenFile:
    """Reader of one token file; opening reads `meta.json` and file sizes, arrays are mapped later.

    Args:
        path: The folder.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If the files contradict each other, with the numbers.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        meta = _read_meta(self.path)
        self.version: int = meta['version']
        self.dtype = np.dtype(meta['dtype']).newbyteorder('<')
        self.num_documents: int = meta['num_documents']
        self.num_tokens: int = meta['num_tokens']
        self.vocab_size: int = meta['vocab_size']
        self.tokenizer: dict[str, str] | None = meta.get('tokenizer')
        self.shortest_document: int = meta.get('shortest_document', 1)
        self._window_counts = {int(k): v for k, v in meta.get('documents_per_window', {}).items()}
        self.has_loss_mask = os.path.isfile(f'{self.path}/loss_mask.bin')
        self._check_size('tokens.bin', self.num_tokens * self.dtype.itemsize)
        if self.has_loss_mask:
            self._check_size('loss_mask.bin', self.num_tokens)
        self._check_size('offsets.npy', (self.num_documents + 1) * 8 + _HEADER_BYTES)

    def _check_size(self, name: str, expected: int) -> None:
        path = f'{self.path}/{name}'  # thousands of files are opened: Path takes longer than stat
        try:
            actual = os.stat(path).st_size
        except FileNotFoundError as error:
            message = f'{path} is missing: the token file is not whole'
            raise FileNotFoundError(message) from error
        if actual != expected:
            raise ValueError(
                f'{path} has {actual:,} bytes, but meta.json ({self.num_documents:,} documents, '
                f'{self.num_tokens:,} tokens of {self.dtype.name}) needs {expected:,}: '
                f'{"truncated" if actual < expected else "too long"} or of another dtype; '
                'make it again with tools/preprocess_data.py'
            )

    @cached_property
    def tokens(self) -> np.ndarray:
        """Ids of all documents, [tokens]."""
        return self._map('tokens.bin', self.dtype)

    @cached_property
    def loss_mask(self) -> np.ndarray | None:
        """1 where a token is to be learned, [tokens]; None when all are."""
        return self._map('loss_mask.bin', np.dtype(np.uint8)) if self.has_loss_mask else None

    @cached_property
    def offsets(self) -> np.ndarray:
        """Where documents start, and the end of the last, [documents + 1]."""
        path = self.path / 'offsets.npy'
        with open(path, 'rb') as file:
            is_ours = file.read(_HEADER_BYTES) == offsets_header(self.num_documents + 1)
        try:
            offsets = (
                np.memmap(path, '<i8', mode='r', offset=_HEADER_BYTES)
                if is_ours  # numpy takes a millisecond to parse a header
                else np.load(path, mmap_mode='r', allow_pickle=False)
            )
        except ValueError as error:
            raise ValueError(f'{path} is not a numpy array: {error}') from error
        if offsets.dtype != np.int64 or offsets.shape != (self.num_documents + 1,):
            raise ValueError(
                f'{path} holds {offsets.dtype} {list(offsets.shape)}, '
                f'expected int64 [{self.num_documents + 1}]'
            )
        if offsets[0] != 0 or offsets[-1] != self.num_tokens:
            raise ValueError(
                f'{path} covers tokens {offsets[0]} to {offsets[-1]}, '
                f'but there are {self.num_tokens}'
            )
        return _read_here_and_there(offsets)

    def _map(self, name: str, dtype: np.dtype) -> np.ndarray:
        if not self.num_tokens:
            return np.empty(0, dtype)  # an empty file cannot be mapped
        return _read_here_and_there(np.memmap(self.path / name, dtype, mode='r'))

    def __len__(self) -> int:
        return self.num_documents

    def document(self, index: int) -> np.ndarray:
        """Ids of document `index`, [tokens]."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f'document {index} of {self.num_documents} in {self.path}')
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def max_documents_in(self, window: int) -> int:
        """Bound on how many documents start within any `window` consecutive tokens."""
        if not self._window_counts:
            return min(window, self.num_documents)
        for length in sorted(self._window_counts):
            if length >= window:
                return min(self._window_counts[length], window)
        longest = max(self._window_counts)
        return min(self._window_counts[longest] * -(-window // longest), self.num_documents)

    def verify(self) -> None:
        """Read everything once.

        Raises:
            ValueError: If documents are out of order or empty, or an id is outside the vocabulary.
        """
        for start in range(0, self.num_documents, _CHUNK):
            lengths = np.diff(self.offsets[start : start + _CHUNK + 1])
            if (lengths < 1).any():
                index = start + int(np.argmax(lengths < 1))
                raise ValueError(
                    f'{self.path}: document {index} has {lengths[index - start]} tokens'
                )
        with open(self.path / 'tokens.bin', 'rb') as file:  # in order, which maps are not set for
            for start in range(0, self.num_tokens, _CHUNK):
                ids = np.fromfile(file, self.dtype, _CHUNK)
                if int(ids.max()) >= self.vocab_size:
                    index = int(np.argmax(ids >= self.vocab_size))
                    raise ValueError(
                        f'{self.path}: token {start + index} is {ids[index]}, '
                        f'outside the vocabulary of {self.vocab_size}'
                    )

    def unmap(self) -> None:
        """Give the maps and their descriptors back; what is read next maps again."""
        for name in _MAPS:
            vars(self).pop(name, None)

    def __getstate__(self) -> dict:
        """Everything but the maps: another process opens its own."""
        return {k: v for k, v in vars(self).items() if k not in _MAPS}


def _read_here_and_there(array: np.memmap) -> np.ndarray:
    """A plain view, which slices faster, of a map whose pages are read one at a time.

    Rows come in random order. The kernel takes a first page for the beginning of more and reads on,
    megabytes on some machines: over a thousand times what a row has.
    """
    if isinstance(array.base, mmap.mmap) and hasattr(mmap, 'MADV_RANDOM'):
        array.base.madvise(mmap.MADV_RANDOM)
    return array.view(np.ndarray)


def offsets_header(count: int) -> bytes:
    """The header of a .npy file of `count` int64, of a length that does not depend on `count`."""
    text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({count},), }}"
    return b'\x93NUMPY\x01\x00' + (118).to_bytes(2, 'little') + text.ljust(117).encode() + b'\n'


_HEADER_BYTES = len(offsets_header(0))


def _read_meta(folder: Path) -> dict:
    path = f'{folder}/meta.json'
    try:
        with open(path, encoding='utf-8') as file:
            meta = json.loads(file.read())
    except (FileNotFoundError, NotADirectoryError) as error:
        if not folder.is_dir():
            raise FileNotFoundError(f'no token file at {folder}') from error
        raise FileNotFoundError(f'{path} is missing, so {folder} is no token file') from error
    except ValueError as error:
        raise ValueError(f'{path} is not JSON: {error}') from error
    kinds = {
        'version': int,
        'dtype': str,
        'num_documents': int,
        'num_tokens': int,
        'vocab_size': int,
    }
    for key, kind in kinds.items():
        if not isinstance(meta, dict) or not isinstance(meta.get(key), kind):
            raise ValueError(f'{path}: key {key!r} is missing or not of type {kind.__name__}')
    if meta['version'] != VERSION:
        raise ValueError(f'{path}: version {meta["version"]}, this reader knows {VERSION}')
    if meta['dtype'] not in ('uint16', 'uint32'):
        raise ValueError(f'{path}: dtype {meta["dtype"]!r}, valid: uint16, uint32')
    return meta
