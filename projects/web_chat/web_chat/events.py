"""What happens while an answer is written: the one stream that page, terminal and tests read."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

PNG_MAGIC = b'\x89PNG\r\n\x1a\n'
MAX_BYTES = 8_000_000
"""Largest image that is shown, in bytes of the file."""
MAX_PIXELS = 25_000_000
"""Largest image that is shown, in pixels: a small file can hold a picture that fills the memory."""


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer, to be put behind the pieces before it.

    An empty one says that nothing has come yet; whoever reads may use the moment to stop.
    """

    text: str


@dataclass(frozen=True, slots=True)
class Code:
    """A whole program that the model asks an interpreter to run."""

    source: str


@dataclass(frozen=True, slots=True)
class Result:
    """What the interpreter answered.

    Attributes:
        text: What was printed, or the error.
        images: Files in PNG format, as `check_png` allows them or not.
    """

    text: str
    images: tuple[bytes, ...] = ()


Event = Text | Code | Result


def check_png(data: bytes) -> tuple[int, int]:
    """Refuse what is no whole PNG file, or a larger one than a page should show.

    The bytes come out of a program that a model wrote. Every chunk is looked at, checksums
    included; the picture is not decoded.

    Args:
        data: The file.

    Returns:
        Width and height, in pixels.

    Raises:
        ValueError: With the reason.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f'an image of {len(data)} bytes is larger than {MAX_BYTES}')
    if not data.startswith(PNG_MAGIC):
        raise ValueError('an image is not in PNG format')
    place = len(PNG_MAGIC)
    size = (0, 0)
    while place + 12 <= len(data):
        (length,) = struct.unpack_from('>I', data, place)
        kind = data[place + 4 : place + 8]
        end = place + 8 + length
        if end + 4 > len(data):
            break
        if struct.unpack_from('>I', data, end)[0] != zlib.crc32(data[place + 4 : end]):
            raise ValueError(f'an image is damaged: chunk {kind!r}')
        first = place == len(PNG_MAGIC)
        if first != (kind == b'IHDR') or (first and length != 13):
            raise ValueError('an image does not begin with its one header')
        if first:
            size = struct.unpack_from('>II', data, place + 8)
            if not 0 < size[0] * size[1] <= MAX_PIXELS:
                raise ValueError(f'an image of {size[0]} x {size[1]} pixels: {MAX_PIXELS} at most')
        place = end + 4
        if kind == b'IEND':
            if place != len(data):
                raise ValueError(f'an image has {len(data) - place} bytes behind its end')
            return size
    raise ValueError('an image is cut off')
