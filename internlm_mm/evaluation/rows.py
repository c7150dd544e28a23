"""Rows of evaluation files, each with the place it stands in."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from internlm_mm.datasets.documents import choose_files, files_below
from internlm_mm.datasets.records import READERS, decode_text, parse_json, read_records
from internlm_mm.utils.suggest import did_you_mean, nearest_path

SUFFIXES = ('.csv', '.txt', *READERS)
"""Endings of files that are read; .txt is a file of JSON, as RACE has them."""


class PlacedRow(NamedTuple):
    """One row.

    Attributes:
        value: A list of fields of a csv without header; of one with, and of JSON, a dict.
        place: `file:line`, for messages.
        subject: What the file is about, by its name or its folder.
    """

    value: Any
    place: str
    subject: str


class Bundle(NamedTuple):
    """The files of one split.

    Attributes:
        files: In a fixed order.
        root: The folder that holds them; sub-folders of it are subjects.
        split: Its name, which file names may end in.
    """

    files: tuple[Path, ...]
    root: Path
    split: str | None


def find_files(path: str | Path, split: str | None, key: str) -> Bundle:
    """The files that a task reads; of what is no data the log says how much is left out.

    Args:
        path: A file, or a folder of them.
        split: A sub-folder, with all below it, or what names of files in the folder are, or end
            or begin with: 'val' finds `law_val.csv`, `val.jsonl` and `val-00000-of-00001.parquet`.
            None takes the files in the folder itself.
        key: The option to name in messages.

    Raises:
        FileNotFoundError: If there are none; names the sub-folders that there are.
        ValueError: If there is data of a kind that is not read.
    """
    path = Path(path)
    if path.is_file():
        return Bundle((path,), path.parent, split)
    if not path.is_dir():
        raise FileNotFoundError(f'{key}: no file or folder {path}{nearest_path(path)}')
    root = path
    if split is not None and (path / split).is_dir():
        root = path / split
        files = choose_files(root, files_below(root), SUFFIXES)
    elif split is not None:
        files = choose_files(
            root,
            (
                file
                for file in path.iterdir()
                if _stem(file) == split
                or _stem(file).endswith(f'_{split}')
                or _stem(file).startswith(f'{split}-')  # test-00000-of-00001 of Hugging Face
            ),
            SUFFIXES,
        )
    else:
        files = choose_files(root, root.iterdir(), SUFFIXES)
    if not files:
        folders = sorted(folder.name for folder in path.iterdir() if folder.is_dir())
        if split is not None:
            there = {_stem(file) for file in path.iterdir() if file.name.lower().endswith(SUFFIXES)}
            hint = did_you_mean(split, {*folders, *there} - {split})
            raise FileNotFoundError(
                f'{key}: no file of the split {split!r} to read in {path}.{hint}'
            )
        hint = f' Sub-folders: {", ".join(folders)}.' if folders else ''
        raise FileNotFoundError(f'{key}: no file to read in {path}.{hint}')
    return Bundle(tuple(files), root, split)


def read_rows(bundle: Bundle, has_header: bool) -> Iterator[PlacedRow]:
    """Rows of all files, in order.

    Args:
        bundle: The files.
        has_header: Whether the first row of a csv has the names of the fields.

    Raises:
        ValueError: If a file cannot be read as what its name says; names file and line.
    """
    for file in bundle.files:
        subject = subject_of(file, bundle)
        if file.suffix.lower() == '.csv':
            for value, place in _read_csv(file, has_header):
                yield PlacedRow(value, place, subject)
        elif file.suffix.lower() == '.txt':
            text = decode_text(file.read_bytes(), file, 1)
            try:
                value = parse_json(text)
            except json.JSONDecodeError as error:
                raise ValueError(f'{file}:{error.lineno}: not JSON: {error.msg}') from error
            except ValueError as error:
                raise ValueError(f'{file}: not JSON: {error}') from error
            yield PlacedRow(value, f'{file}', subject)
        elif file.suffix.lower() == '.json' and _has_lines(file):
            yield from _read_lines(file, subject)
        else:
            for record in read_records(file):
                yield PlacedRow(record.value, record.place, subject)


def subject_of(file: Path, bundle: Bundle) -> str:
    """'law' of `val/law_val.csv`, 'high' of `test/high/12.txt`; '' of `val.jsonl`."""
    folder = file.parent.relative_to(bundle.root)
    if folder.parts:
        return '/'.join(folder.parts)
    name, split = _stem(file), bundle.split
    if split is None:
        return name
    return '' if name == split or name.startswith(f'{split}-') else name.removesuffix(f'_{split}')


def _has_lines(file: Path) -> bool:
    """Whether a .json file has an object on each line, as those of CLUE and FewCLUE."""
    first, _, rest = decode_text(file.read_bytes(), file, 1).lstrip().partition('\n')
    if not first.startswith('{') or not rest.strip():
        return False
    try:
        parse_json(first)
    except ValueError:
        return False
    return True


def _read_lines(file: Path, subject: str) -> Iterator[PlacedRow]:
    text = decode_text(file.read_bytes(), file, 1)
    for number, line in enumerate(text.split('\n'), 1):
        if not line.strip():
            continue
        try:
            yield PlacedRow(parse_json(line), f'{file}:{number}', subject)
        except ValueError as error:
            raise ValueError(f'{file}:{number}: not JSON: {error}') from error


def _read_csv(file: Path, has_header: bool) -> Iterator[tuple[Any, str]]:
    text = decode_text(file.read_bytes(), file, 1)
    reader = csv.reader(io.StringIO(text, newline=''), strict=True)
    header: Sequence[str] | None = None
    line = 1
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f'{file}:{line}: not csv: {error}') from error
        place, line = f'{file}:{line}', reader.line_num + 1
        if not fields:
            continue
        if not has_header:
            yield fields, place
        elif header is None:
            header = [name.strip() for name in fields]
        elif len(fields) != len(header):
            raise ValueError(f'{place}: {len(fields)} fields, the header has {len(header)}')
        else:
            yield dict(zip(header, fields, strict=True)), place


def _stem(file: Path) -> str:
    for suffix in SUFFIXES:
        if file.name.lower().endswith(suffix):
            return file.name[: -len(suffix)]
    return file.name.partition('.')[0]
