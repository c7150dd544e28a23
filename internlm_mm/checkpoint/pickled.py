"""Tensors in files of other programs: what `torch.save` wrote, and safetensors, one interface.

`torch.save` writes pickles, which may run code when they are read. Here they are read by torch's
restricted reader, which knows tensors and plain values and refuses everything else.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from internlm_mm.checkpoint.tensor_file import DTYPE_CODES

_MAX_MAPPED = 64 * 2**20
"""Bytes of a file that are read before its mapping is renewed: mapped pages count as memory, and
opening a file again takes as long as reading about this much."""

_LFS = b'version https://git-lfs.github.com/spec/'

_GLOBAL = re.compile(r'GLOBAL ([\w.]+)')


def read_pickled(path: Path) -> Any:
    """What `torch.save` put into a file: tensors and plain values, mapped where that is possible.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, damaged, or holds anything else, such as code.
    """
    _check_downloaded(path)
    # Files from before torch 1.6 are no archives and cannot be mapped.
    mapped = zipfile.is_zipfile(path) or path.stat().st_size == 0
    if not mapped and _begins_as_archive(path):
        raise ValueError(f'{path} is truncated: the end of the archive is missing')
    try:
        if mapped:
            return torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        return _read_unmapped(path, path.stat().st_mtime_ns)
    except FileNotFoundError:
        raise
    except Exception as error:  # of half a dozen types, by what is wrong with the file
        raise ValueError(f'{path} {_what_is_wrong(path, error)}') from error


def _check_downloaded(path: Path) -> None:
    """Git without its LFS extension leaves a few lines of text where a large file should be."""
    with open(path, 'rb') as file:
        if file.read(len(_LFS)) == _LFS:
            raise ValueError(
                f'{path} is the pointer that git left in place of a large file: fetch it with '
                '`git lfs pull`'
            )


def _begins_as_archive(path: Path) -> bool:
    with open(path, 'rb') as file:
        return file.read(4) == b'PK\x03\x04'


@lru_cache(maxsize=1)
def _read_unmapped(path: Path, changed: int) -> Any:  # noqa: ARG001  part of the cache's key
    """A file that is read as a whole; the last one stays, for its tensors are asked for singly."""
    return torch.load(path, map_location='cpu', weights_only=True)


def _what_is_wrong(path: Path, error: Exception) -> str:
    names = set(_GLOBAL.findall(str(error)))
    if zipfile.is_zipfile(path):
        try:
            names |= set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except Exception:  # damaged, too: the first finding is what is told
            names = set(names)
    if names:
        return (
            f'holds pickled code or objects, which are never run or made here: '
            f'{", ".join(sorted(names))}; expected tensors and plain values alone'
        )
    first = str(error).strip().split('\n')[0] or type(error).__name__
    if first.startswith('Weights only load failed'):
        first = 'nothing that torch reads'
    return f'is truncated, damaged or no file of torch.save ({first})'


def check_pickled(path: Path) -> None:
    """Read a whole file once and compare the checksums that are stored in it, if there are any.

    Raises:
        ValueError: Naming the record that differs.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if not record.CRC:  # torch was told to write none, or the record is empty
                continue
            try:
                with archive.open(record) as content:
                    while content.read(1 << 20):
                        pass
            except zipfile.BadZipFile as error:
                raise ValueError(f'{path} is damaged: {error}') from error


class PickledTensors:
    """A file of `torch.save` that holds named tensors; has what `safetensors.safe_open` has.

    Args:
        path: The file.

    Attributes:
        shapes: Of every tensor, by name.
        dtypes: Likewise.

    Raises:
        ValueError: If it cannot be read, or holds anything but named tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state: dict[str, Tensor] | None = None
        self._unread = 0  # bytes that may still be read from the mapping
        state = self._open()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in state.items()}

    def _open(self) -> dict[str, Tensor]:
        if self._state is None:
            content = read_pickled(self.path)
            if not isinstance(content, Mapping):
                raise ValueError(
                    f'{self.path} holds a {type(content).__name__}; expected tensors by name'
                )
            for name, value in content.items():
                if not (isinstance(name, str) and isinstance(value, Tensor)):
                    raise ValueError(
                        f'{self.path} holds a {type(value).__name__} at {name!r}; expected a tensor'
                    )
            self._state = {name: value.detach() for name, value in content.items()}
            self._unread = _MAX_MAPPED
        return self._state

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self.shapes)

    def get_tensor(self, name: str) -> Tensor:
        """One tensor, a view of the file where it is mapped: copy what is to be kept."""
        tensor = self._open()[name]
        self._unread -= tensor.nbytes
        if self._unread < 0:
            self._state = None  # what is read now stays mapped as long as `tensor` lives
        return tensor

    def get_slice(self, name: str) -> _Slice:
        """One tensor, of which parts can be read by index."""
        return _Slice(self, name)

    def release(self) -> None:
        """Give the mapped memory back; the next tensor maps the file anew."""
        self._state = None


class _Slice:
    """What `safe_open(...).get_slice` returns."""

    def __init__(self, file: PickledTensors, name: str) -> None:
        self._file, self._name = file, name

    def get_shape(self) -> list[int]:
        return list(self._file.shapes[self._name])

    def get_dtype(self) -> str:
        return str(self._file.dtypes[self._name]).removeprefix('torch.')

    def __getitem__(self, part: Any) -> Tensor:
        return self._file.get_tensor(self._name)[part].clone()


_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


def dtype_named(code: str) -> torch.dtype:
    """The dtype that `get_slice(name).get_dtype()` calls `code`.

    Raises:
        ValueError: If torch or we have none of that name.
    """
    dtype = _DTYPES.get(code, getattr(torch, code, None))
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f'dtype {code!r} is unknown here')
    return dtype


@lru_cache(maxsize=4)
def _pickled(path: Path, changed: int) -> PickledTensors:  # noqa: ARG001  part of the cache's key
    """Opening takes a tenth of a second for some hundred tensors, which are asked for singly."""
    return PickledTensors(path)


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A file of named tensors, safetensors or of `torch.save`, by its ending.

    Has `keys()`, `get_tensor(name)` and `get_slice(name)` with `get_shape()` and `get_dtype()`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated or damaged, or holds anything but tensors.
    """
    if path.suffix != '.safetensors':
        yield _pickled(path, path.stat().st_mtime_ns)
        return
    try:
        opened = safe_open(path, framework='pt')
    except SafetensorError as error:
        _check_downloaded(path)
        raise ValueError(f'{path} is truncated or damaged: {error}') from error
    except RuntimeError as error:  # of torch, where a file is larger than memory
        raise OSError(f'{path} cannot be mapped into memory: {error}') from error
    with opened as file:
        yield file
