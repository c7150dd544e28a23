"""Records in json, jsonl, both with .gz, and parquet files, each with the line it stands in."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from internlm_mm.utils.suggest import nearest_path


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


class Options(NamedTuple):
    """How a file is read.

    Attributes:
        columns: Those to read of a parquet file that has one of them.
        on_damage: Takes the error of a line that is no JSON; None raises it.
    """

    columns: Sequence[str] | None = None
    on_damage: Callable[[ValueError], None] | None = None


def read_records(
    path: str | Path,
    columns: Sequence[str] | None = None,
    on_damage: Callable[[ValueError], None] | None = None,
) -> Iterator[Record]:
    """Records of one file, in order.

    A .json or .json.gz file is a list of records or one record; .jsonl and .jsonl.gz have one a
    line, and empty lines between them; .parquet has one a row.

    Args:
        path: The file.
        columns: Those to read of a parquet file that has one of them; else all are read, and of
            other files everything.
        on_damage: Takes the error of each line of a file of lines that is no JSON, and reading
            goes on behind it; None raises the first.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read as what its name says; names file and line.
        ModuleNotFoundError: For parquet without pyarrow.
    """
    path = Path(path)
    return READERS[suffix_of_file(path, READERS)](path, Options(columns, on_damage))


def suffix_of_file(path: Path, known: Iterable[str]) -> str:
    """As `suffix_of`, of a file that has to be there.

    Raises:
        FileNotFoundError: If there is no such file, whatever its ending.
        ValueError: If its ending is none of those `known`.
    """
    suffix = suffix_of(path, known) if path.exists() else ''
    if not path.is_file():
        raise FileNotFoundError(f'no file {path}{nearest_path(path)}')
    return suffix


def suffix_of(path: Path, known: Iterable[str]) -> str:
    """The ending that says how a file is read.

    Raises:
        ValueError: If it is none of those `known`.
    """
    for suffix in known:
        if path.name.lower().endswith(suffix):
            return suffix
    endings = ', '.join(known)
    kind = repr(path.suffix) if path.suffix else 'files without an ending'
    if path.is_dir():
        kind = 'a folder'
    raise ValueError(f'{path}: cannot read {kind}, only {endings}')


def decode_text(data: bytes, path: Path, line: int) -> str:
    """UTF-8 that begins at a line of a file.

    Raises:
        ValueError: If it is none; names file and line.
    """
    try:
        return data.decode('utf-8-sig' if line == 1 else 'utf-8')
    except UnicodeDecodeError as error:
        line += data.count(b'\n', 0, error.start)
        is_utf16 = data.startswith((b'\xff\xfe', b'\xfe\xff'))
        raise ValueError(
            f'{path}:{line}: not UTF-8: {error.reason} (byte {error.start})'
            + ('; it begins as UTF-16 does' if is_utf16 else '')
        ) from error


def parse_json(text: str) -> Any:
    """JSON by the letter: Python's own reader takes NaN, and of a key that comes twice the last.

    Raises:
        ValueError: If it is none; `json.JSONDecodeError` where the place is known.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError('lists or objects are nested too deep') from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise ValueError(f'key {twice!r} comes twice in one object')
    return value


def _number(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f'a number of {len(text):,} digits')
    return int(text)


def _constant(name: str) -> None:
    raise ValueError(f'{name} is no JSON; null is')


_DIGITS = 1000  # Python refuses to read some thousands
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_number, parse_constant=_constant)
_BETWEEN = re.compile(r'[\s,]*')


def _read_json(path: Path, options: Options) -> Iterator[Record]:  # noqa: ARG001
    yield from _records_of(path.read_bytes(), path, path.stat().st_size)


def _read_json_gz(path: Path, options: Options) -> Iterator[Record]:  # noqa: ARG001
    try:
        data = gzip.decompress(path.read_bytes())
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f'{path}: damaged gzip file: {error}') from error
    yield from _records_of(data, path, path.stat().st_size)


def _records_of(data: bytes, path: Path, size: int) -> Iterator[Record]:
    text = decode_text(data, path, 1)
    try:
        content = parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f'{path}:{error.lineno}: {_no_json(error, text)}') from error
    except ValueError as error:
        raise ValueError(f'{path}:{_flawed_line(text)}: not JSON: {error}') from None
    records = content if isinstance(content, list) else [content]
    for number, record in enumerate(records, 1):
        done = size * number // len(records)
        yield Record(record, path, number, f'{path}: record {number}', done)


def _no_json(error: json.JSONDecodeError, text: str) -> str:
    hint = '; it has NUL bytes, as files have whose writing was cut off' if '\0' in text else ''
    return f'not JSON: {error.msg} (column {error.colno}){hint}'


def _flawed_line(text: str) -> int:
    """Where the record begins that `parse_json` refuses without saying where."""
    place = len(text) - len(text.lstrip())
    if text[place] != '[':
        return 1 + text.count('\n', 0, place)
    place += 1
    while True:
        place = _BETWEEN.match(text, place).end()  # type: ignore[union-attr]  # may be empty
        try:
            _, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError):
            return 1 + text.count('\n', 0, place)


def _read_jsonl(path: Path, options: Options) -> Iterator[Record]:
    with open(path, 'rb') as file:
        yield from _json_lines(file, file, path, options)


def _read_jsonl_gz(path: Path, options: Options) -> Iterator[Record]:
    try:
        with open(path, 'rb') as file, gzip.open(file) as lines:
            yield from _json_lines(lines, file, path, options)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f'{path}: damaged gzip file: {error}') from error


def _json_lines(
    lines: Iterable[bytes], file: BinaryIO, path: Path, options: Options
) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f'{path}:{number}'
        try:
            value = _parse_line(line, path, number)
        except ValueError as error:
            if options.on_damage is None:
                raise
            options.on_damage(error)
            continue
        yield Record(value, path, number, place, file.tell())


def _parse_line(line: bytes, path: Path, number: int) -> Any:
    text = decode_text(line, path, number).rstrip().lstrip('\ufeff')  # of joined files
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f'{path}:{number}: {_no_json(error, text)}') from error
    except ValueError as error:
        raise ValueError(f'{path}:{number}: not JSON: {error}') from None


def _read_parquet(path: Path, options: Options) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{path}: parquet needs pyarrow: pip install pyarrow') from error
    size = path.stat().st_size
    try:
        with ParquetFile(path) as table:
            found = [name for name in options.columns or () if name in table.schema_arrow.names]
            number, rows = 0, max(table.metadata.num_rows, 1)
            for batch in table.iter_batches(batch_size=1024, columns=found or None):
                for value in batch.to_pylist():
                    number += 1
                    done = size * number // rows
                    yield Record(value, path, number, f'{path}:{number}', done)
    except ArrowException as error:
        raise ValueError(f'{path}: damaged parquet file: {error}') from error


READERS: dict[str, Callable[[Path, Options], Iterator[Record]]] = {
    '.json': _read_json,
    '.json.gz': _read_json_gz,
    '.jsonl': _read_jsonl,
    '.jsonl.gz': _read_jsonl_gz,
    '.parquet': _read_parquet,
}
"""How files are read, by their ending."""
