"""Documents in text files: txt, json, jsonl, both of them with .gz, and parquet."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.logging import print_log

from internlm_mm.datasets.permutation import hash_key
from internlm_mm.datasets.records import (
    READERS,
    decode_text,
    read_records,
    suffix_of,
    suffix_of_file,
)
from internlm_mm.utils.suggest import did_you_mean, kind, nearest_path


class Document(NamedTuple):
    """One text.

    Attributes:
        text: What it says.
        path: The file it is in.
        line: Line, record or row it starts at, counted from 1.
        bytes_read: Bytes of the file on disk read so far, this document included.
    """

    text: str
    path: Path
    line: int
    bytes_read: int

    @property
    def place(self) -> str:
        """`file:line`, for messages."""
        return f'{self.path}:{self.line}'


def read_documents(path: str | Path, *, text_key: str = 'text') -> Iterator[Document]:
    """Documents of one file, in order.

    A .txt file is one document. A .json or .json.gz file is a list of records or one record;
    .jsonl and .jsonl.gz have one record a line; .parquet one a row. A record is an object with a
    text under `text_key`, or (but for parquet) the text itself. Empty texts are left out.

    Args:
        path: The file.
        text_key: Where a record has its text.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read as what its name says; names file and line.
        ModuleNotFoundError: For parquet without pyarrow.
    """
    path = Path(path)
    suffix_of_file(path, _ENDINGS)
    for document in _read_texts(path, text_key):
        try:
            document.text.encode()
        except UnicodeEncodeError as error:  # JSON may spell half a character
            raise ValueError(f'{document.place}: the text has a lone surrogate') from error
        if document.text:
            yield document


def find_files(path: str | Path, *, texts: bool = True) -> list[Path]:
    """Files below `path` that can be read, by name; see `choose_files`.

    Args:
        path: A folder, or one file.
        texts: Whether .txt files are data; False where records are read.

    Raises:
        FileNotFoundError: If there is nothing there, or nothing that can be read.
        ValueError: If `path` is a file of another kind, or a folder with data of another kind.
    """
    path = Path(path)
    endings = _ENDINGS if texts else tuple(READERS)
    if path.is_file():
        suffix_of(path, endings)
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f'no file or folder {path}{nearest_path(path)}')
    files = choose_files(path, files_below(path), endings)
    if not files:
        raise FileNotFoundError(f'{path} has no file that ends in {", ".join(endings)}')
    return files


def files_below(root: Path) -> Iterator[Path]:
    """Every file of a folder and of those in it, in no order; links to folders are followed.

    Args:
        root: The folder.

    Raises:
        OSError: If a folder cannot be read.
        ValueError: If a link leads back to a folder that it is in.
    """

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(root, onerror=fail, followlinks=True):
        for name in list(folders):
            link = Path(parent, name)
            if not link.is_symlink():
                continue
            if any(part.startswith('.') for part in link.relative_to(root).parts):
                folders.remove(name)  # what is hidden is no data
                continue
            inside, target = link.relative_to(root).parents, link.resolve()
            if any((root / one).resolve().is_relative_to(target) for one in inside):
                raise ValueError(f'{link} is a link back to {target}, which it is in')
        yield from (Path(parent, name) for name in files)


def check_link(file: Path) -> None:
    """Refuse a link that leads nowhere.

    Args:
        file: Where data should be.

    Raises:
        ValueError: With what it is a link to.
    """
    if file.is_symlink() and not file.exists():
        raise ValueError(f'{file} is a link to {os.readlink(file)}, which is not there')


def choose_files(root: Path, paths: Iterable[Path], endings: tuple[str, ...]) -> list[Path]:
    """Those files that can be read, by name.

    Hidden files, what is written about the data (README, LICENSE, .md) and files that hold no
    data, as scripts and pictures, are left out, and the log says how many.

    Args:
        root: The folder that all are below.
        paths: Files, and folders, which are passed over.
        endings: Of files that can be read.

    Raises:
        ValueError: If one is data of another kind, or a link that leads nowhere.
    """
    files, left_out = [], Counter[str]()
    for file in sorted(paths):
        name = file.name.lower()
        is_hidden = any(part.startswith('.') for part in file.relative_to(root).parts)
        if not is_hidden and name.endswith((*endings, *_OTHER_DATA)):
            check_link(file)
        if not file.is_file():
            continue
        if is_hidden:
            left_out['hidden'] += 1
        elif name.endswith(endings):
            files.append(file)
        elif _ABOUT.match(name):
            left_out['README, LICENSE or .md'] += 1
        elif name.endswith(_OTHER_DATA):
            suffix_of(file, endings)
        else:
            left_out[file.suffix or 'without an ending'] += 1
    if left_out:
        kinds = ', '.join(f'{count:,} {kind}' for kind, count in sorted(left_out.items()))
        print_log(
            f'{root}: {left_out.total():,} files are no data and left out: {kinds}',
            logger='current',
            level=logging.INFO,
        )
    return files


def find_domains(path: str | Path, *, texts: bool = True) -> dict[str, list[Path]]:
    """Files below `path` by domain.

    A file's domain is the sub-folder of `path` it is in or, directly in `path`, its name without
    the ending. A single file is one domain.

    Args:
        path: As in `find_files`.
        texts: As in `find_files`.

    Raises:
        FileNotFoundError: If there is nothing that can be read.
        ValueError: If there is data of a kind that cannot be read.
    """
    root = Path(path)
    domains: dict[str, list[Path]] = {}
    for file in find_files(root, texts=texts):
        parts = file.relative_to(root).parts
        name = parts[0] if len(parts) > 1 else file.name[: -len(suffix_of(file, _ENDINGS))]
        domains.setdefault(name, []).append(file)
    return domains


def sample_texts(
    paths: Iterable[str | Path], *, text_key: str = 'text', max_bytes: int | None = None
) -> Iterator[str]:
    """Texts of files and folders, thinned out evenly to about `max_bytes` of files.

    Which documents are kept depends on their texts alone.

    Args:
        paths: Files and folders.
        text_key: Where a record has its text.
        max_bytes: Bytes on disk to keep; None keeps all.
    """
    files = [file for path in paths for file in find_files(path)]
    size = sum(file.stat().st_size for file in files)
    share = 1.0 if max_bytes is None else max_bytes / max(size, 1)
    for file in files:
        for document in read_documents(file, text_key=text_key):
            if share >= 1 or fraction_of(document.text, 'sample') < share:
                yield document.text


def fraction_of(text: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the text alone: draws the same documents on every run."""
    return int.from_bytes(hash_key(purpose, text)[:7], 'little') / 2**56


def _text_of(record: Any, text_key: str, place: str) -> str:
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        found = kind(record)
        raise ValueError(
            f'{place}: expected an object with {text_key!r} or a string, found {found}'
        )
    if text_key not in record:
        hint = did_you_mean(text_key, record)
        raise ValueError(f'{place}: the record has no text_key={text_key!r}.{hint}')
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f'{place}: {text_key!r} is no text but {kind(text)}')
    return text


def _read_txt(path: Path) -> Document:
    data = path.read_bytes()
    return Document(decode_text(data, path, 1), path, 1, len(data))


def _read_texts(path: Path, text_key: str) -> Iterator[Document]:
    if path.name.lower().endswith('.txt'):
        yield _read_txt(path)
        return
    for record in read_records(path, [text_key]):
        text = _text_of(record.value, text_key, record.place)
        yield Document(text, path, record.number, record.bytes_read)


_ENDINGS = ('.txt', *READERS)
_ABOUT = re.compile(r'readme|licen[cs]e|.*\.md$')
_OTHER_DATA = (
    *('.txt', '.csv', '.tsv', '.ndjson', '.jsonlines'),
    *('.gz', '.zst', '.zstd', '.bz2', '.xz', '.lz4', '.zip', '.tar', '.tgz', '.7z', '.rar'),
    *('.arrow', '.feather', '.avro', '.orc', '.xlsx', '.xls', '.db', '.sqlite'),
    *('.bin', '.npy', '.npz', '.pkl', '.pickle', '.pt', '.h5', '.hdf5', '.msgpack', '.tfrecord'),
)
# Data that is not read; it is refused, so that nobody trains on less than there is.
