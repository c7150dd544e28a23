"""Rows of whole documents, or of documents end to end, from token files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import numpy as np
from mmengine.logging import print_log

from internlm_mm.datasets.bins import Bins, best_fit, one_each
from internlm_mm.datasets.mixture import check_names
from internlm_mm.datasets.open_files import OpenFiles
from internlm_mm.datasets.packing import Row, pack_row
from internlm_mm.datasets.row_order import RowOrder
from internlm_mm.datasets.token_file import TokenFile
from internlm_mm.datasets.token_stream import TokenStream, join_fragments
from internlm_mm.utils.suggest import did_you_mean

PACKINGS: dict[str | None, Callable[[np.ndarray, int], Bins] | None] = {
    'best_fit': best_fit,
    'documents': None,
    None: one_each,
}
"""How rows are made; those with a function cut no document."""


class PackedRows:
    """Token files as an endless sequence of rows; which one `rows[i]` is depends on seed and i.

    A row has one domain. Documents do not see one another. What does not fill a row is padding,
    which nothing sees and nothing is learned from.

    Args:
        files: A token file for each domain.
        seq_len: Length of a row, in tokens.
        packing: 'best_fit' puts whole documents together so that little is wasted; 'documents'
            puts them end to end and cuts them where rows end, which wastes nothing; None makes
            each a row.
        weights: Share of each domain, by name, in any unit; None reads every row once an epoch.
        shuffle: False keeps the order, for evaluation.
        seed: Another seed, another order.
        together: How many documents that follow one another share a row always.

    Raises:
        ValueError: If an option is none, a domain is empty, or a document does not fit into a row.
    """

    def __init__(
        self,
        files: Mapping[str, TokenFile],
        *,
        seq_len: int,
        packing: str | None = 'best_fit',
        weights: Mapping[str, float] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        together: int = 1,
    ) -> None:
        check_packing(packing, seq_len)
        if weights is not None:
            check_names(weights, list(files), 'weights')
            files = {name: file for name, file in files.items() if name in weights}
        for file in files.values():
            if not len(file):
                raise ValueError(f'{file.path} has no document')
        self.seq_len = seq_len
        self.packing = packing
        self.together = together
        self.seed = seed
        self.shuffle = shuffle
        self.domains = list(files)
        first = next(iter(files.values()))
        self.vocab_size = first.vocab_size
        self.tokenizer = first.tokenizer
        self.num_tokens = sum(file.num_tokens for file in files.values())
        self.files = list(files.values())
        open_files = OpenFiles()
        self._streams = [TokenStream([file], open_files=open_files) for file in self.files]
        make = PACKINGS[packing]
        self._bins = None if make is None else [self._bins_of(file, make) for file in self.files]
        if self._bins is None:
            num_rows = [-(-file.num_tokens // seq_len) for file in self.files]
            most = max(stream.max_fragments(seq_len) for stream in self._streams)
        else:
            num_rows = [len(bins) for bins in self._bins]
            most = max(bins.most for bins in self._bins) * together
        most += 1  # padding
        self.max_docs = most if packing is None else min(-(-most // 8) * 8, max(seq_len, 2))
        self.num_rows = num_rows
        self._order = RowOrder(self.domains, num_rows, weights=weights, shuffle=shuffle, seed=seed)
        self._report(num_rows)

    @property
    def waste(self) -> float:
        """Share of all rows that is padding."""
        return 1 - self.num_tokens / (len(self) * self.seq_len)

    def __len__(self) -> int:
        """Rows an epoch."""
        return len(self._order)

    def locate(self, index: int) -> tuple[int, int]:
        """The domain of row `index`, and its place among that domain's rows; any index >= 0."""
        return self._order.locate(index)

    def __getitem__(self, index: int) -> Row:
        """Row `index` of the endless sequence."""
        return self.read(*self.locate(index))

    def read(self, domain: int, row: int) -> Row:
        """Row `row` of a domain."""
        stream = self._streams[domain]
        if self._bins is None:
            fragments = stream.read(row * self.seq_len, (row + 1) * self.seq_len)
        else:
            starts = self.files[domain].offsets[:: self.together]
            fragments = join_fragments(
                [
                    stream.read(int(starts[document]), int(starts[document + 1]))
                    for document in self._bins[domain].row(row).tolist()
                ]
            )
        return pack_row(
            *fragments,
            seq_len=self.seq_len,
            max_docs=self.max_docs,
            domain_id=domain,
            num_domains=len(self.domains),
        )

    def _bins_of(self, file: TokenFile, make: Callable[[np.ndarray, int], Bins]) -> Bins:
        lengths = np.diff(file.offsets[:: self.together])
        file.unmap()
        try:
            return make(lengths, self.seq_len)
        except ValueError as error:
            raise ValueError(
                f"{file.path}: {error} of seq_len; packing='documents' cuts what is too long"
            ) from None

    def _report(self, num_rows: list[int]) -> None:
        for name, file, rows in zip(self.domains, self.files, num_rows, strict=True):
            waste = 1 - file.num_tokens / (rows * self.seq_len)
            print_log(
                f'{name}: {len(file):,} documents, {file.num_tokens:,} tokens in {rows:,} rows of '
                f'{self.seq_len}, packing={self.packing!r}: {waste:.1%} of them padding',
                logger='current',
                level=logging.INFO,
            )


def check_packing(packing: str | None, seq_len: int) -> None:
    """Refuse options that there are not, before anything is read.

    Raises:
        ValueError: With the nearest name.
    """
    if packing not in PACKINGS:
        names = [name for name in PACKINGS if name is not None]
        raise ValueError(
            f'packing={packing!r} is none of {", ".join(map(repr, PACKINGS))}.'
            f'{did_you_mean(str(packing), names)}'
        )
    if seq_len < 2:
        raise ValueError(f'seq_len must be at least 2, got {seq_len}')
