"""PNG files that come out of a program nobody has read."""

import struct
import zlib

MAGIC = b'\x89PNG\r\n\x1a\n'

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
# Adam7: first column and row, then the steps between columns and rows, of the seven passes.
_KNOWN = 'IHDR PLTE IDAT IEND tRNS gAMA cHRM sRGB sBIT bKGD hIST pHYs sPLT tIME tEXt'.split()
_MOST_CHUNKS = 4096  # a kilobyte each, in the largest file of the usual limits
_PASSES = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)


def check_png(data: bytes, max_bytes: int, max_pixels: int) -> tuple[int, int]:
    """Refuse what is no whole, honest PNG file of at most this size.

    Chunks, their number, kinds, checksums and order are looked at. The pixels are decompressed,
    never further than the header says, and must be exactly as many: nothing that reads the file
    later meets more.

    Args:
        data: The file.
        max_bytes: Its largest size.
        max_pixels: Most pixels, width times height.

    Returns:
        Width and height, in pixels.

    Raises:
        ValueError: With the reason.
    """
    if len(data) > max_bytes:
        raise ValueError(f'an image of {len(data)} bytes is larger than {max_bytes}')
    header, pixels, colours = _read_chunks(data)
    width, height, depth, colour, compression, kind, interlace = struct.unpack('>IIBBBBB', header)
    if not 0 < width * height <= max_pixels or max(width, height) > 65_535:
        raise ValueError(f'an image of {width} x {height} pixels: {max_pixels} at most')
    if depth not in _DEPTHS.get(colour, ()) or compression or kind or interlace > 1:
        raise ValueError('the header of an image is not one of PNG')
    if colours % 3 or colours > 3 * 2 ** min(depth, 8) or (colour == 3) > bool(colours):
        raise ValueError('the palette of an image is none')
    bits = depth * _CHANNELS[colour]
    sizes = [(width, height)]
    if interlace:
        sizes = [
            ((width - left + across - 1) // across, (height - top + down - 1) // down)
            for left, top, across, down in _PASSES
        ]
    _check_pixels(pixels, [(1 + (columns * bits + 7) // 8, rows) for columns, rows in sizes])
    return width, height


def _read_chunks(data: bytes) -> tuple[bytes, list[bytes], int]:
    """Header, compressed pixels and size of the palette of a file with whole chunks in order."""
    if not data.startswith(MAGIC):
        raise ValueError('an image is not in PNG format')
    place = len(MAGIC)
    header = b''
    pixels: list[bytes] = []
    last = b''
    count = colours = 0
    while place + 12 <= len(data):
        (length,) = struct.unpack_from('>I', data, place)
        kind = data[place + 4 : place + 8]
        count += 1
        if count > _MOST_CHUNKS:
            raise ValueError(f'an image has more than {_MOST_CHUNKS} chunks')
        end = place + 8 + length
        if end + 4 > len(data):
            break
        if struct.unpack_from('>I', data, end)[0] != zlib.crc32(data[place + 4 : end]):
            raise ValueError(f'an image is damaged: chunk {kind!r}')
        if (not last) != (kind == b'IHDR') or (not last and length != 13):
            raise ValueError('an image does not begin with its one header')
        if kind == b'IHDR':
            header = data[place + 8 : end]
        elif kind == b'IDAT':
            if pixels and last != b'IDAT':
                raise ValueError('the pixels of an image are not in one piece')
            pixels.append(data[place + 8 : end])
        elif kind == b'PLTE':
            if colours or pixels:
                raise ValueError('an image has its palette twice, or behind its pixels')
            colours = length
        elif kind == b'acTL':
            raise ValueError('an image is animated')
        elif kind in (b'zTXt', b'iTXt', b'iCCP'):
            raise ValueError(f'an image holds compressed data that is no picture: chunk {kind!r}')
        elif kind.decode('latin-1') not in _KNOWN:
            raise ValueError(f'an image has a chunk that is not one of the known: {kind!r}')
        place = end + 4
        last = kind
        if kind == b'IEND':
            if place != len(data):
                raise ValueError(f'an image has {len(data) - place} bytes behind its end')
            return header, pixels, colours
    raise ValueError('an image is cut off')


def _check_pixels(pieces: list[bytes], passes: list[tuple[int, int]]) -> None:
    """Refuse what does not unpack to whole rows, each of which begins with one of five filters.

    Args:
        pieces: What is compressed.
        passes: Bytes of a row, and the number of rows.
    """
    left = [(size, size * rows) for size, rows in passes if size > 1 and rows]
    expected = sum(total for _, total in left)
    decompress = zlib.decompressobj()
    count = row = end = step = 0
    for piece in pieces:
        while piece:
            try:
                part = decompress.decompress(piece, 1 << 20)
            except zlib.error:
                raise ValueError('the pixels of an image cannot be decompressed') from None
            begin, count = count, count + len(part)
            if count > expected:
                raise ValueError('an image holds more pixels than its header says')
            if decompress.unused_data:
                raise ValueError('an image has data behind its pixels')
            while row < count:
                if row == end:
                    step, total = left.pop(0)
                    end += total
                filters = part[row - begin : end - begin : step]
                if max(filters) > 4:
                    raise ValueError('a row of an image has a filter that there is not')
                row += step * len(filters)
            piece = decompress.unconsumed_tail
    if count != expected or not decompress.eof:
        raise ValueError('an image holds fewer pixels than its header says')
