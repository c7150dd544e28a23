"""Records in json, jsonl, jsonl.gz and parquet files, each with the line it stands in."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple


class Record(NamedTuple):
    """One record.

    Attributes:
        value: What JSON holds; an object of the row's columns in parquet.
        path: The file it is in.
        number: Its line in a file of lines, else its number; counted from 1.
        place: Where that is, for messages: `file:line`, or `file: record 3` in a .json file.
        bytes_read: Bytes of the file on disk read so far, this record included.
    """

    value: Any
    path: Path
    number: int
    place: str
    bytes_read: int


def read_records(path: str | Path, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """Records of one file, in order.

    A .json file is a list of records or one record; .jsonl and .jsonl.gz have one a line, and
    empty lines between them; .parquet has one a row.

    Args:
        path: The file.
        columns: Those to read of a parquet file that has one of them; else all are read, and of
            other files everything.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read as what its name says; names file and line.
        ModuleNotFoundError: For parquet without pyarrow.
    """
    path = Path(path)
    suffix = suffix_of(path, READERS)
    if not path.is_file():
        raise FileNotFoundError(f'no file {path}')
    return READERS[suffix](path, columns)


def suffix_of(path: Path, known: Iterable[str]) -> str:
    """The ending that says how a file is read.

    Raises:
        ValueError: If it is none of those `known`.
    """
    for suffix in known:
        if path.name.lower().endswith(suffix):
            return suffix
    endings = ', '.join(known)
    raise ValueError(
        f'{path}: cannot read {path.suffix or "files without an ending"!r}, only {endings}'
    )


def decode_text(data: bytes, path: Path, line: int) -> str:
    """UTF-8 that begins at a line of a file.

    Raises:
        ValueError: If it is none; names file and line.
    """
    try:
        return data.decode('utf-8-sig' if line == 1 else 'utf-8')
    except UnicodeDecodeError as error:
        line += data.count(b'\n', 0, error.start)
        raise ValueError(
            f'{path}:{line}: not UTF-8: {error.reason} (byte {error.start})'
        ) from error


def _read_json(path: Path, columns: Sequence[str] | None) -> Iterator[Record]:  # noqa: ARG001
    data = path.read_bytes()
    try:
        content = json.loads(decode_text(data, path, 1))
    except json.JSONDecodeError as error:
        raise ValueError(f'{path}:{error.lineno}: not JSON: {error.msg}') from error
    records = content if isinstance(content, list) else [content]
    for number, record in enumerate(records, 1):
        done = len(data) * number // len(records)
        yield Record(record, path, number, f'{path}: record {number}', done)


def _read_jsonl(path: Path, columns: Sequence[str] | None) -> Iterator[Record]:  # noqa: ARG001
    with open(path, 'rb') as file:
        yield from _json_lines(file, file, path)


def _read_jsonl_gz(path: Path, columns: Sequence[str] | None) -> Iterator[Record]:  # noqa: ARG001
    try:
        with open(path, 'rb') as file, gzip.open(file) as lines:
            yield from _json_lines(lines, file, path)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f'{path}: damaged gzip file: {error}') from error


def _json_lines(lines: Iterable[bytes], file: BinaryIO, path: Path) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f'{path}:{number}'
        try:
            value = json.loads(decode_text(line, path, number))
        except json.JSONDecodeError as error:
            raise ValueError(f'{place}: not JSON: {error.msg} (column {error.colno})') from error
        yield Record(value, path, number, place, file.tell())


def _read_parquet(path: Path, columns: Sequence[str] | None) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{path}: parquet needs pyarrow: pip install pyarrow') from error
    size = path.stat().st_size
    try:
        with ParquetFile(path) as table:
            found = [name for name in columns or () if name in table.schema_arrow.names]
            number, rows = 0, max(table.metadata.num_rows, 1)
            for batch in table.iter_batches(batch_size=1024, columns=found or None):
                for value in batch.to_pylist():
                    number += 1
                    done = size * number // rows
                    yield Record(value, path, number, f'{path}:{number}', done)
    except ArrowException as error:
        raise ValueError(f'{path}: damaged parquet file: {error}') from error


READERS: dict[str, Callable[[Path, Sequence[str] | None], Iterator[Record]]] = {
    '.json': _read_json,
    '.jsonl': _read_jsonl,
    '.jsonl.gz': _read_jsonl_gz,
    '.parquet': _read_parquet,
}
"""How files are read, by their ending."""
