"""The documents of several token files end to end, read at any place."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from internlm_mm.datasets.open_files import OpenFiles
from internlm_mm.datasets.token_file import TokenFile
from internlm_mm.structures import IGNORE_INDEX

_BLOCK = 4096  # documents between two known places of a filtered file


class Fragments(NamedTuple):
    """Consecutive documents, the first and last perhaps in part.

    Attributes:
        tokens: [tokens], int64.
        labels: The next token of the same document, also where the fragment stops before the
            document does; `IGNORE_INDEX` at a document's last token, [tokens], int64.
        lengths: Tokens of each fragment, [fragments], int64.
    """

    tokens: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray


class TokenStream:
    """Token files as one stream of documents.

    Nothing is loaded at the start unless short documents must be dropped: then the offsets of the
    files that have some are read once, and one number for every 4096 documents is kept.

    Args:
        files: In the order they are read; must share a vocabulary.
        min_document_length: Documents with fewer tokens are dropped.
        open_files: Bounds how many are mapped at once; shared by the streams of a process.
    """

    def __init__(
        self,
        files: Sequence[TokenFile],
        min_document_length: int = 1,
        open_files: OpenFiles | None = None,
    ) -> None:
        self.files = list(files)
        self._open_files = OpenFiles() if open_files is None else open_files
        self._parts = [_Part(file, min_document_length) for file in self.files]
        self._starts = [0]
        for part in self._parts:
            self._starts.append(self._starts[-1] + part.num_tokens)
        self.num_tokens = self._starts[-1]
        self.num_dropped = sum(part.num_dropped for part in self._parts)
        self._min_length = min_document_length

    def max_fragments(self, window: int) -> int:
        """Bound on how many documents, whole or in part, lie in any `window` consecutive tokens."""
        # All but the first and the last have at least min_document_length tokens.
        bound = min(window, 2 + max(0, window - 2) // self._min_length)
        if self.num_dropped:
            return bound
        return min(bound, 1 + self._max_starts(window))

    def _max_starts(self, window: int) -> int:
        most = 0
        for first, part in enumerate(self._parts):
            starts, covered = part.file.max_documents_in(window), 1
            for other in self._parts[first + 1 :]:  # a window may reach into the files that follow
                if covered >= window:
                    break
                starts += other.file.max_documents_in(window)
                covered += other.num_tokens
            most = max(most, starts)
        return most

    def read(self, start: int, stop: int) -> Fragments:
        """Tokens `start` to `stop` of the stream; what lies behind its end is left out."""
        stop = min(stop, self.num_tokens)
        first = bisect_right(self._starts, start) - 1
        pieces = []
        for index in range(first, len(self._parts)):
            base = self._starts[index]
            if base >= stop:
                break
            if self._parts[index].num_tokens:
                self._open_files.use(self._parts[index].file)
                piece_stop = min(stop - base, self._parts[index].num_tokens)
                pieces.append(self._parts[index].read(max(start - base, 0), piece_stop))
        return join_fragments(pieces)


def join_fragments(pieces: Sequence[Fragments]) -> Fragments:
    """Fragments one after the other, as one."""
    if len(pieces) == 1:
        return pieces[0]
    return Fragments(*(np.concatenate(arrays) for arrays in zip(*pieces, strict=True)))


class _Part:
    """One file of a stream, without its short documents."""

    def __init__(self, file: TokenFile, min_length: int) -> None:
        self.file = file
        self.num_tokens = file.num_tokens
        self.num_dropped = 0
        self._min_length = min_length
        self._block_starts: np.ndarray | None = None
        if file.shortest_document < min_length:
            self._index_blocks()

    def _index_blocks(self) -> None:
        """Count the kept tokens before every block of documents."""
        kept_tokens = [0]
        for first in range(0, self.file.num_documents, _BLOCK):
            lengths = np.diff(self.file.offsets[first : first + _BLOCK + 1])
            kept = lengths >= self._min_length
            kept_tokens.append(int(lengths[kept].sum()))
            self.num_dropped += len(kept) - int(kept.sum())
        self.file.unmap()
        starts = np.cumsum(np.array(kept_tokens, np.int64))
        self.num_tokens = int(starts[-1])
        self._block_starts = starts if self.num_dropped else None

    def read(self, start: int, stop: int) -> Fragments:
        if self._block_starts is None:
            return self._read_contiguous(start, stop)
        return self._read_filtered(self._block_starts, start, stop)

    def _read_contiguous(self, start: int, stop: int) -> Fragments:
        """Read tokens of the file that lie side by side."""
        offsets = self.file.offsets
        first = int(np.searchsorted(offsets, start, 'right')) - 1
        last = int(np.searchsorted(offsets, stop, 'left'))
        bounds = np.asarray(
            offsets[first : last + 1], np.int64
        )  # from the first's start to the last's end
        # One token more than asked for, so that the last keeps its true label.
        window = self.file.tokens[start : stop + 1].astype(np.int64)
        if int(window.max()) >= self.file.vocab_size:
            self._raise_bad_id(start, window)
        tokens = window[: stop - start]
        labels = np.full(stop - start, IGNORE_INDEX, np.int64)
        labels[: len(window) - 1] = window[1:]
        if self.file.loss_mask is not None:
            untrained = self.file.loss_mask[start + 1 : stop + 1] == 0
            labels[: len(untrained)][untrained] = IGNORE_INDEX
        labels[bounds[1:][bounds[1:] <= stop] - 1 - start] = IGNORE_INDEX
        return Fragments(tokens, labels, np.diff(bounds.clip(start, stop)))

    def _read_filtered(self, block_starts: np.ndarray, start: int, stop: int) -> Fragments:
        """Read tokens of the kept documents, one document after the other."""
        pieces = []
        block = int(np.searchsorted(block_starts, start, 'right')) - 1
        while block < len(block_starts) - 1 and block_starts[block] < stop:
            offsets = self.file.offsets[block * _BLOCK : (block + 1) * _BLOCK + 1]
            lengths = np.diff(offsets)
            kept = np.flatnonzero(lengths >= self._min_length)
            origins, lengths = offsets[kept], lengths[kept]
            ends = block_starts[block] + np.cumsum(lengths)  # in the kept tokens
            first = int(np.searchsorted(ends, start, 'right'))
            last = int(np.searchsorted(ends - lengths, stop))
            for index in range(first, last):
                shift = int(origins[index] - (ends[index] - lengths[index]))
                place = max(start, int(ends[index] - lengths[index]))
                pieces.append(
                    self._read_contiguous(place + shift, min(stop, int(ends[index])) + shift)
                )
            block += 1
        return join_fragments(pieces)

    def _raise_bad_id(self, start: int, window: np.ndarray) -> None:
        index = int(np.argmax(window >= self.file.vocab_size))
        raise ValueError(
            f'{self.file.path}: token {start + index} is {window[index]}, '
            f'outside the vocabulary of {self.file.vocab_size}: the file is damaged'
        )
