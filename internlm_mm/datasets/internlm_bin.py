"""InternLM's tokenised files, `X.bin` and `X.bin.meta`: read as rows, and written.

`X.bin` has a line of JSON for each sample, `{"tokens": [...]}`. A negative id is a token that is
context only; its loss is masked. Id 0 has no sign, and InternLM never learns it. `X.bin.meta` is a
numpy array [samples, 2]: where each line starts, in bytes, and how many tokens it has.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmengine.logging import print_log

from internlm_mm.datasets.documents import check_link, files_below
from internlm_mm.datasets.packed import PackedRows, check_packing
from internlm_mm.datasets.row_order import check_order
from internlm_mm.datasets.token_cache import cached_folder, hash_contents
from internlm_mm.datasets.token_file import TokenFile
from internlm_mm.datasets.token_writer import TokenFileWriter
from internlm_mm.registry import DATASETS
from internlm_mm.tokenizers import build_template
from internlm_mm.utils.suggest import nearest_path

DROPPED_NAME = 'dropped.json'


class BinSample(NamedTuple):
    """One sample.

    Attributes:
        ids: Its tokens, [tokens], int64.
        loss_mask: 1 where a token is learned, [tokens], uint8.
    """

    ids: np.ndarray
    loss_mask: np.ndarray


@DATASETS.register_module()
class InternLMBinDataset(PackedRows):
    """`.bin` files of InternLM and InternEvo as an endless, shuffled sequence of rows.

    They are made into token files below `cache_dir` when a run first needs them, by one process,
    for which the others wait.

    Args:
        data_root: A .bin file, or a folder: each sub-folder directly in it that holds .bin files,
            at any depth, is a domain, and so is each .bin file beside them.
        seq_len: Length of a row, in tokens.
        vocab_size: Ids are below it.
        chat_template: A name in the registry, or a dict with `type`: what the samples were spelt
            with. It changes no row; chat and export find it in the checkpoint's config.
        packing: 'documents' puts samples end to end and cuts them where rows end, as InternLM
            does; 'best_fit' puts whole samples together; None makes each a row.
        min_length: Samples of fewer tokens are left out; the log says how many.
        weights: Share of each domain, by name, in any unit; None reads every row once an epoch.
        shuffle: False keeps the order, for evaluation.
        seed: Another seed, another order.
        cache_dir: Where token files are made.

    Raises:
        FileNotFoundError: If there is no .bin file.
        ValueError: If a line is no sample, or .bin and .meta contradict each other: names file and
            line; or there is no such template.
    """

    def __init__(
        self,
        data_root: str | Path,
        *,
        seq_len: int,
        vocab_size: int,
        chat_template: str | Mapping[str, Any] | None = None,
        packing: str | None = 'documents',
        min_length: int = 1,
        weights: Mapping[str, float] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        cache_dir: str | Path = 'data/cache',
    ) -> None:
        check_packing(packing, seq_len)
        check_order(weights, shuffle)
        self.template = None if chat_template is None else build_template(chat_template)
        domains = find_bins(data_root)
        paths = [path for files in domains.values() for path in files]
        source = {
            'kind': 'InternLM .bin',
            'domains': {name: hash_contents(files) for name, files in domains.items()},
            'metas': hash_contents(meta for path in paths if (meta := _meta(path)).is_file()),
            'vocab_size': vocab_size,
            'min_length': min_length,
            'files': [DROPPED_NAME],
        }

        def make(folder: Path) -> None:
            dropped = {}
            for name, files in domains.items():
                with TokenFileWriter(
                    folder / name, vocab_size=vocab_size, has_loss_mask=True
                ) as writer:
                    dropped[name] = _copy(files, writer, min_length)
            text = json.dumps(dropped, indent=2, ensure_ascii=False)
            (folder / DROPPED_NAME).write_text(text + '\n', encoding='utf-8')

        folder = cached_folder(cache_dir, source, make)
        dropped = json.loads((folder / DROPPED_NAME).read_text(encoding='utf-8'))
        self.num_dropped = sum(dropped.values())
        for name, count in dropped.items():
            if count:
                print_log(
                    f'{name}: {count:,} samples of fewer than min_length={min_length} tokens are '
                    'left out',
                    logger='current',
                    level=logging.INFO,
                )
        super().__init__(
            {name: TokenFile(folder / name) for name in domains},
            seq_len=seq_len,
            packing=packing,
            weights=weights,
            shuffle=shuffle,
            seed=seed,
        )


def find_bins(data_root: str | Path) -> dict[str, list[Path]]:
    """`.bin` files by domain, in the order of their names.

    Args:
        data_root: As in `InternLMBinDataset`.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a link leads nowhere, or back to a folder that it is in.
    """
    root = Path(data_root)
    if root.is_file():
        return {root.stem: [root]}
    if not root.is_dir():
        raise FileNotFoundError(f'data_root {root}: no file or folder{nearest_path(root)}')
    domains: dict[str, list[Path]] = {}
    for path in sorted(files_below(root)):
        parts = path.relative_to(root).parts
        if path.suffix == '.bin' and not any(part.startswith('.') for part in parts):
            check_link(path)
            domains.setdefault(parts[0] if len(parts) > 1 else path.stem, []).append(path)
    if not domains:
        raise FileNotFoundError(f'data_root {root}: there is no .bin file')
    return domains


def read_bin(path: str | Path) -> Iterator[BinSample]:
    """Samples of a `.bin` file, in order, compared with its `.bin.meta` where there is one.

    Args:
        path: The .bin file.

    Raises:
        ValueError: If a line is no sample, or the two files contradict each other: names file and
            line.
    """
    for _, sample in read_lines(path):
        yield sample


def read_lines(
    path: str | Path, on_damage: Callable[[ValueError], None] | None = None
) -> Iterator[tuple[int, BinSample]]:
    """Samples of a `.bin` file with their lines, counted from 1.

    Args:
        path: The .bin file.
        on_damage: Takes the error of each line that is no sample, and reading goes on behind it;
            None raises the first.

    Raises:
        ValueError: As `read_bin`; with `on_damage` only where the two files contradict each other.
    """
    path = Path(path)
    meta = read_meta(path) if _meta(path).is_file() else None
    start, number = 0, 0
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            place = f'{path}:{number}'
            try:
                sample = _sample(line, place)
            except ValueError as error:
                if on_damage is None:
                    raise
                on_damage(error)
                start += len(line)
                continue
            if meta is not None:
                said = meta[number - 1] if number <= len(meta) else None
                if said is None or tuple(said) != (start, len(sample.ids)):
                    what = 'no such line' if said is None else f'{said[1]} tokens at byte {said[0]}'
                    raise ValueError(
                        f'{place}: {len(sample.ids)} tokens at byte {start}, but '
                        f'{_meta(path).name} says {what}: they were not written together'
                    )
            start += len(line)
            yield number, sample
    if meta is not None and number != len(meta):
        raise ValueError(
            f'{path} has {number} lines, but {_meta(path).name} {len(meta)}: '
            'they were not written together'
        )


def read_meta(path: str | Path) -> np.ndarray:
    """Where lines start and how many tokens they have, [samples, 2]; columns between are left out.

    Args:
        path: The .bin file.

    Raises:
        ValueError: If the .meta file is no such array.
    """
    meta = _meta(Path(path))
    try:
        table = np.load(meta, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f'{meta} is not a numpy array: {error}') from error
    if table.ndim != 2 or table.shape[1] < 2 or not np.issubdtype(table.dtype, np.integer):
        raise ValueError(
            f'{meta} holds {table.dtype} {list(table.shape)}, not integers [samples, 2]'
        )
    return table[:, [0, -1]]


def write_bin(path: str | Path, samples: Iterable[BinSample], *, overwrite: bool = False) -> int:
    """Write a `.bin` and its `.bin.meta`; they appear when they are whole.

    Args:
        path: The .bin file.
        samples: Tokens and masks.
        overwrite: Replace files that are there.

    Returns:
        How many samples there are.

    Raises:
        FileExistsError: If `path` exists and `overwrite` is not set.
        ValueError: If id 0 is to be learned, which the format cannot say.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f'{path} exists')
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f'.{path.name}.', dir=path.parent))
    table: list[tuple[int, int]] = []
    try:
        with open(folder / 'bin', 'wb') as file:
            for number, (ids, loss_mask) in enumerate(samples, 1):
                ids, learned = np.asarray(ids, np.int64), np.asarray(loss_mask, bool)
                if bool((learned & (ids == 0)).any()):
                    raise ValueError(f'sample {number}: id 0 is to be learned, but has no sign')
                table.append((file.tell(), len(ids)))
                signed = np.where(learned, ids, -ids).tolist()
                file.write(json.dumps({'tokens': signed}).encode() + b'\n')
        with open(folder / 'meta', 'wb') as file:
            np.save(file, np.array(table, np.int64).reshape(-1, 2), allow_pickle=False)
        os.replace(folder / 'meta', _meta(path))
        os.replace(folder / 'bin', path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return len(table)


def samples_of(file: TokenFile) -> Iterator[BinSample]:
    """Documents of a token file, for `write_bin`."""
    for index in range(len(file)):
        start, stop = int(file.offsets[index]), int(file.offsets[index + 1])
        ids = file.tokens[start:stop].astype(np.int64)
        mask = file.loss_mask
        yield BinSample(ids, np.ones_like(ids, np.uint8) if mask is None else mask[start:stop])


def _copy(files: Iterable[Path], writer: TokenFileWriter, min_length: int) -> int:
    """How many samples are left out."""
    dropped = 0
    for path in files:
        for number, (ids, loss_mask) in read_lines(path):
            if len(ids) < min_length:
                dropped += 1
                continue
            try:
                writer.add(ids, loss_mask)
            except ValueError as error:
                raise ValueError(f'{path}:{number}: {error}') from None
    return dropped


def _sample(line: bytes, place: str) -> BinSample:
    try:
        record = json.loads(line.rstrip())
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{place}: not JSON: {re.sub(r": line 1", "", str(error))}') from error
    tokens = record.get('tokens') if isinstance(record, dict) else None
    if not isinstance(tokens, list) or not tokens:
        raise ValueError(f"{place}: 'tokens' is missing, empty or no list")
    if not all(type(token) is int for token in tokens):
        raise ValueError(f"{place}: 'tokens' has something that is no whole number")
    if max(map(abs, tokens)) >= 2**32:
        raise ValueError(f"{place}: 'tokens' has {max(tokens, key=abs)}, which is no id")
    signed = np.array(tokens, np.int64)
    return BinSample(np.abs(signed), (signed > 0).astype(np.uint8))


def _meta(path: Path) -> Path:
    return path.with_name(f'{path.name}.meta')
