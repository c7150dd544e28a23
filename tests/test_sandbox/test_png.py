import io
import random
import struct
import zlib

import pytest
from PIL import Image

from internlm_mm.sandbox.png import MAGIC, check_png


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def file(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 0) -> bytes:
    header = struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0)
    return MAGIC + chunk(b'IHDR', header) + b''.join(chunks) + chunk(b'IEND', b'')


def pixels(count: int) -> bytes:
    return chunk(b'IDAT', zlib.compress(bytes(count)))


def check(data: bytes) -> tuple[int, int]:
    return check_png(data, 1 << 20, 1_000_000)


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I;16'])
@pytest.mark.parametrize('size', [(1, 1), (7, 5), (33, 9), (200, 100)])
def test_files_that_pillow_writes(mode: str, size: tuple[int, int]) -> None:
    out = io.BytesIO()
    Image.new(mode, size, 1).save(out, 'png')
    assert check(out.getvalue()) == size


@pytest.mark.parametrize('size', [(1, 1), (2, 3), (4, 5), (5, 4), (8, 8), (13, 7), (64, 65)])
@pytest.mark.parametrize(('depth', 'colour', 'bits'), [(8, 2, 24), (1, 0, 1), (16, 6, 64)])
def test_interlaced_files(size: tuple[int, int], depth: int, colour: int, bits: int) -> None:
    """Passes are counted pixel by pixel."""
    pattern = (
        '16462646 77777777 56565656 77777777 36463646 77777777 56565656 77777777'.split()
    )  # which pass a pixel is in, by its place in a square of eight
    width, height = size
    count = 0
    for number in '1234567':
        rows = {
            y: sum(pattern[y % 8][x % 8] == number for x in range(width)) for y in range(height)
        }
        count += sum(1 + (columns * bits + 7) // 8 for columns in rows.values() if columns)
    header = struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 1)
    data = MAGIC + chunk(b'IHDR', header) + pixels(count) + chunk(b'IEND', b'')
    assert check(data) == size
    with pytest.raises(ValueError, match='fewer pixels'):
        check(MAGIC + chunk(b'IHDR', header) + pixels(count - 1) + chunk(b'IEND', b''))


def test_pixels_in_pieces() -> None:
    packed = zlib.compress(bytes(5 * 3))
    assert check(file(4, 3, chunk(b'IDAT', packed[:3]), chunk(b'IDAT', packed[3:]))) == (4, 3)


@pytest.mark.parametrize(
    ('data', 'reason'),
    [
        (b'GIF89a', 'not in PNG format'),
        (b'', 'not in PNG format'),
        (MAGIC, 'cut off'),
        (file(4, 3, pixels(15))[:-1], 'cut off'),
        (file(4, 3, pixels(15)) + b'x', '1 bytes behind its end'),
        (file(4, 3, pixels(14)), 'fewer pixels'),
        (file(4, 3, pixels(16)), 'more pixels'),
        (file(4, 3, pixels(10**7)), 'more pixels'),
        (file(4, 3, chunk(b'IDAT', b'junk')), 'cannot be decompressed'),
        (file(4, 3), 'fewer pixels'),
        (file(4, 3, chunk(b'IDAT', zlib.compress(bytes(15))[:-2])), 'fewer pixels'),
        (file(0, 3, pixels(15)), '0 x 3 pixels'),
        (file(2000, 2000, pixels(15)), '2000 x 2000 pixels: 1000000 at most'),
        (file(100_000, 1, pixels(15)), '100000 x 1 pixels'),
        (file(4, 3, pixels(15), depth=3), 'not one of PNG'),
        (file(4, 3, pixels(15), colour=5), 'not one of PNG'),
        (file(4, 3, pixels(15), depth=4, colour=2), 'not one of PNG'),
        (file(4, 3, pixels(15), chunk(b'tEXt', b'a\0b'), pixels(15)), 'not in one piece'),
        (file(4, 3, chunk(b'acTL', bytes(8)), pixels(15)), 'animated'),
        (file(4, 3, chunk(b'zTXt', b'a\0\0' + zlib.compress(bytes(99))), pixels(15)), 'zTXt'),
        (MAGIC + pixels(15) + chunk(b'IEND', b''), 'does not begin with its one header'),
        (file(4, 3, chunk(b'IHDR', bytes(13)), pixels(15)), 'does not begin with its one header'),
        (file(4, 3, pixels(15)).replace(b'IEND', b'IENX'), 'damaged'),
        (file(4, 3, chunk(b'eXIf', b'MM'), pixels(15)), 'not one of the known: b.eXIf'),
        (file(4, 3, chunk(b'\xff' * 4, b''), pixels(15)), 'not one of the known'),
        (file(4, 3, pixels(15), chunk(b'IDAT', b'more')), 'data behind its pixels'),
        (file(4, 3, *[chunk(b'IDAT', b'')] * 5000, pixels(15)), 'more than 4096 chunks'),
        (file(4, 3, pixels(15), colour=3), 'palette of an image is none'),
        (file(4, 3, chunk(b'PLTE', b'1234'), pixels(15), colour=3), 'palette of an image is none'),
        (file(4, 3, chunk(b'PLTE', bytes(771)), pixels(15), colour=3), 'palette of an image'),
        (file(4, 3, *[chunk(b'PLTE', b'123')] * 2, pixels(15), colour=3), 'palette twice'),
        (file(4, 3, pixels(15), chunk(b'PLTE', b'123'), colour=3), 'behind its pixels'),
    ],
)
def test_what_is_no_honest_file(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check(data)


def test_too_many_bytes() -> None:
    with pytest.raises(ValueError, match='larger than 10'):
        check_png(file(4, 3, pixels(15)), 10, 1000)


def test_any_damage_is_noticed() -> None:
    """One byte changed anywhere: it is refused, as every chunk has a checksum."""
    right = file(4, 3, chunk(b'tEXt', b'a\0b'), pixels(15))
    draw = random.Random(0)
    for place in range(len(right)):
        wrong = bytearray(right)
        wrong[place] ^= draw.randrange(1, 256)
        with pytest.raises(ValueError, match='image'):
            check(bytes(wrong))


@pytest.mark.parametrize('interlace', [0, 1])
@pytest.mark.parametrize(('width', 'height', 'depth', 'colour'), [(9, 7, 1, 0), (600, 700, 16, 6)])
def test_filters_of_rows(interlace: int, width: int, height: int, depth: int, colour: int) -> None:
    """Each row begins with one of five; Pillow, too, takes no other."""
    bits = depth * {0: 1, 6: 4}[colour]
    passes = [(0, 0, 1, 1)]
    if interlace:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4)]
        passes += [(1, 0, 2, 2), (0, 1, 1, 2)]
    starts, size = [], 0
    for left, top, across, down in passes:
        columns, rows = len(range(left, width, across)), len(range(top, height, down))
        for _ in range(rows if columns else 0):
            starts.append(size)
            size += 1 + (columns * bits + 7) // 8
    raw = bytearray(random.Random(3).randbytes(997) * (size // 997 + 1))[:size]
    for place, start in enumerate(starts):
        raw[start] = place % 5
    header = struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, interlace)

    def packed() -> bytes:
        body = chunk(b'IDAT', zlib.compress(bytes(raw)))
        return MAGIC + chunk(b'IHDR', header) + body + chunk(b'IEND', b'')

    assert check(packed()) == (width, height)
    Image.open(io.BytesIO(packed())).load()
    for wrong in (0, len(starts) // 2, len(starts) - 1):
        kept, raw[starts[wrong]] = raw[starts[wrong]], 5 + wrong % 251
        with pytest.raises(ValueError, match='filter'):
            check(packed())
        with pytest.raises(OSError, match='data stream'):
            Image.open(io.BytesIO(packed())).load()
        raw[starts[wrong]] = kept
