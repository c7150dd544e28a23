"""Rows for pre-training, cut from token files."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmengine.logging import print_log

from internlm_mm.datasets.mixture import check_names
from internlm_mm.datasets.open_files import OpenFiles
from internlm_mm.datasets.packing import Row, pack_row
from internlm_mm.datasets.row_order import RowOrder, check_order
from internlm_mm.datasets.token_file import TokenFile
from internlm_mm.datasets.token_stream import TokenStream
from internlm_mm.registry import DATASETS


@DATASETS.register_module()
class PretrainDataset:
    """Documents packed into rows of `seq_len`, an endless, shuffled sequence of them.

    The documents of a domain lie end to end and are cut at multiples of `seq_len`; a document that
    is cut goes on in another row, and its fragments count positions from 0 each. The last row of a
    domain is padded: every token is in exactly one row of an epoch. A row has one domain.

    Which row `dataset[i]` is depends on nothing but `seed` and i. Without `weights` an epoch is
    every row once, in an order of its own. With `weights` domains come in these proportions and
    each goes through its own epochs.

    A row can hold `max_docs` documents, which fixes the width of `Batch.cu_seqlens`. By default it
    is the least bound that the files' own counts of documents in a window of tokens give, or
    `min_document_length` implies, rounded up to a multiple of 8.

    Args:
        data_root: A token file (a folder made by tools/preprocess_data.py), or a folder with one
            sub-folder for each domain, which is a token file or a folder of several.
        seq_len: Length of a row, in tokens.
        domains: Names of the sub-folders to read; None reads all.
        weights: Share of each domain to read, by name, in any unit; None reads rows as they are.
        min_document_length: Documents of fewer tokens, end token included, are dropped.
        max_docs: Most documents in a row, in place of the bound above.
        shuffle: False keeps the order of the files, for evaluation.
        seed: Another seed, another order.

    Raises:
        FileNotFoundError: If there is no data.
        ValueError: If files disagree, a domain is unknown, or nothing is left to read.
    """

    def __init__(
        self,
        data_root: str | Path,
        *,
        seq_len: int,
        domains: Sequence[str] | None = None,
        weights: Mapping[str, float] | None = None,
        min_document_length: int = 1,
        max_docs: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        for name, value in dict(seq_len=seq_len, min_document_length=min_document_length).items():
            if value < 1:
                raise ValueError(f'{name} must be at least 1, got {value}')
        check_order(weights, shuffle)
        files = find_token_files(data_root)
        for key, names in (('domains', domains), ('weights', weights)):
            if names is not None:
                check_names(names, list(files), key)
                files = {name: files[name] for name in files if name in names}
        self.data_root = Path(data_root)
        self.seq_len = seq_len
        self.seed = seed
        self.shuffle = shuffle
        self.domains = list(files)
        opened = {name: [TokenFile(path) for path in paths] for name, paths in files.items()}
        first, *others = (file for group in opened.values() for file in group)
        for other in others:
            _check_same_vocabulary(first, other)
        self.vocab_size = first.vocab_size
        self.tokenizer = first.tokenizer
        open_files = OpenFiles()
        self._streams = [
            TokenStream(group, min_document_length, open_files) for group in opened.values()
        ]
        num_rows = [-(-stream.num_tokens // seq_len) for stream in self._streams]
        self.num_tokens = sum(stream.num_tokens for stream in self._streams)
        self.num_dropped = sum(stream.num_dropped for stream in self._streams)
        self._report_dropped(min_document_length, num_rows)
        if max_docs is None:
            most = max(stream.max_fragments(seq_len) for stream in self._streams) + 1  # padding
            max_docs = min(-(-most // 8) * 8, max(seq_len, 2))
        self.max_docs = max_docs
        self._order = RowOrder(self.domains, num_rows, weights=weights, shuffle=shuffle, seed=seed)

    def _report_dropped(self, min_document_length: int, num_rows: Sequence[int]) -> None:
        if self.num_dropped:
            print_log(
                f'{self.data_root}: dropped {self.num_dropped:,} documents shorter than '
                f'min_document_length={min_document_length} tokens',
                logger='current',
                level=logging.INFO,
            )
        for name, rows in zip(self.domains, num_rows, strict=True):
            if not rows:
                raise ValueError(
                    f'{self.data_root}: domain {name!r} has no document of at least '
                    f'min_document_length={min_document_length} tokens'
                )

    def __len__(self) -> int:
        return len(self._order)

    def locate(self, index: int) -> tuple[int, int]:
        """The domain of row `index`, and its place in that domain's files; any index >= 0."""
        return self._order.locate(index)

    def __getitem__(self, index: int) -> Row:
        """Row `index` of the endless sequence."""
        domain, row = self.locate(index)
        start = row * self.seq_len
        fragments = self._streams[domain].read(start, start + self.seq_len)
        return pack_row(
            *fragments,
            seq_len=self.seq_len,
            max_docs=self.max_docs,
            domain_id=domain,
            num_domains=len(self.domains),
        )


def find_token_files(data_root: str | Path) -> dict[str, list[Path]]:
    """Token files below a folder, by domain, in the order of their names.

    Args:
        data_root: As in `PretrainDataset`. A folder that is a token file itself is one domain.

    Raises:
        FileNotFoundError: If the folder or token files in it are missing.
        ValueError: If the folder holds training and validation data together.
    """
    root = Path(data_root)
    if not root.is_dir():
        raise FileNotFoundError(
            f'data_root {root} does not exist; make it with tools/train_tokenizer.py and '
            'tools/preprocess_data.py, or use dataset=dict(type=RandomTokens) for a speed run'
        )
    if (root / 'meta.json').is_file():
        return {root.name: [root]}
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and path.name[0] != '.']
    found: dict[str, list[Path]] = {}
    for folder in folders:
        if (folder / 'meta.json').is_file():
            found[folder.name] = [folder]
            continue
        # Strings: there may be many thousands, and Path takes longer than to look.
        names = sorted(os.listdir(folder))
        paths = [folder / name for name in names if os.path.isfile(f'{folder}/{name}/meta.json')]
        if paths:
            found[folder.name] = paths
    if {'train', 'validation'} <= found.keys():
        raise ValueError(
            f'data_root {root} holds training and validation data; '
            f'name one of them: {root / "train"} or {root / "validation"}'
        )
    if not found:
        raise FileNotFoundError(
            f'data_root {root} holds no token file (a folder with meta.json); '
            'make one with tools/preprocess_data.py'
        )
    return found


def _check_same_vocabulary(first: TokenFile, other: TokenFile) -> None:
    if other.vocab_size != first.vocab_size:
        raise ValueError(
            f'{other.path} has vocab_size={other.vocab_size}, '
            f'but {first.path} has {first.vocab_size}: they were made with different tokenizers'
        )
    if other.tokenizer != first.tokenizer:
        raise ValueError(
            f'{other.path} was made with tokenizer {other.tokenizer}, '
            f'{first.path} with {first.tokenizer}'
        )
