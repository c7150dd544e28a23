"""PNG files for tests, made without the code under test."""

import struct
import zlib


def png(width: int, height: int, pixels: bytes) -> bytes:
    """A grey picture of which the compressed pixels are given."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack('>I', zlib.crc32(kind + data))
        return struct.pack('>I', len(data)) + kind + data + check

    header = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    body = chunk(b'IHDR', header) + chunk(b'IDAT', pixels) + chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + body


RIGHT = png(4, 3, zlib.compress(bytes(5 * 3)))
