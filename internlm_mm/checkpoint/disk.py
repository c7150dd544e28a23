"""Files that reach the disk, and their checksums, taken as they are written.

The checksum is CRC-32, the one of zip files. zlib-ng computes it with the processor's own
instructions, many times as fast as zlib does; the numbers are the same.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from internlm_mm.utils.publish import sync_folder

try:
    from zlib_ng.zlib_ng import crc32
except ImportError:  # where it is not installed, the same numbers take longer
    from zlib import crc32

_BLOCK = 8 << 20  # bytes that are written, and their checksum taken, at a time


class SummedFile:
    """A new file, written in order. Leaving the block normally waits until it is on the disk.

    Every block is sent on its way to the disk as soon as it is written, so that the checksum, and
    whatever makes the next block, are computed while the disk works.

    Args:
        path: The file; its folder exists. One that is there is overwritten.

    Attributes:
        size: Bytes written.
        crc32: Their checksum.
    """

    def __init__(self, path: Path) -> None:
        self.size = 0
        self.crc32 = 0
        self._file = open(path, 'wb', buffering=0)
        self._sent = 0

    def write(self, data: Any) -> None:
        """Append bytes, or another buffer of them."""
        rest = memoryview(data)
        while rest:
            written = self._file.write(rest[:_BLOCK])
            block, rest = rest[:written], rest[written:]
            self.size += written
            self._send()
            self.crc32 = crc32(block, self.crc32)

    def _send(self) -> None:
        """Have the system begin to write what it holds, where it can be told to."""
        if self.size - self._sent >= _BLOCK and hasattr(os, 'posix_fadvise'):
            # It is not needed again: Linux writes such pages at once, and later gives them up.
            with suppress(OSError):  # advice, which a file system need not take
                os.posix_fadvise(
                    self._file.fileno(),
                    self._sent,
                    self.size - self._sent,
                    os.POSIX_FADV_DONTNEED,
                )
            self._sent = self.size

    def __enter__(self) -> 'SummedFile':
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._file:
            if kind is None:
                os.fsync(self._file.fileno())


def write_file(path: Path, data: bytes) -> tuple[int, int]:
    """Write a small file through to the disk. Returns its size in bytes and CRC-32."""
    with SummedFile(path) as file:
        file.write(data)
    return file.size, file.crc32


def copy_folder(source: Path, target: Path) -> dict[str, tuple[int, int]]:
    """Copy what is in a folder through to the disk.

    Args:
        source: Small files, and folders of them.
        target: The folder to make.

    Returns:
        Size in bytes and CRC-32 of every file, by its path in the folder.
    """
    target.mkdir(parents=True, exist_ok=True)
    files: dict[str, tuple[int, int]] = {}
    for path in sorted(source.iterdir()):
        copy = target / path.name
        if path.is_dir():
            inside = copy_folder(path, copy)
            files |= {f'{path.name}/{name}': written for name, written in inside.items()}
        else:
            files[path.name] = write_file(copy, path.read_bytes())
    sync_folder(target)
    return files


def file_crc32(path: Path) -> int:
    """CRC-32 of a file's content."""
    checksum = 0
    buffer = memoryview(bytearray(1 << 20))
    with open(path, 'rb', buffering=0) as file:
        while count := file.readinto(buffer):
            checksum = crc32(buffer[:count], checksum)
    return checksum


def files_crc32(paths: Sequence[Path]) -> list[int]:
    """CRC-32 of several files, read side by side: neither reading nor summing hold the lock."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(file_crc32, paths))
