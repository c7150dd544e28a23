import os
import socket
from collections.abc import Iterator

import pytest

from internlm_mm.sandbox import Limits
from internlm_mm.sandbox.exchange import Exchange, Output, frame
from internlm_mm.sandbox.reply import ProtocolError

LIMITS = Limits(output_chars=10, output_mb=1, images=1, image_mb=1)


class Wire:
    """Both ends of a session's channels."""

    def __init__(self) -> None:
        self.host, self.worker = socket.socketpair()
        pairs = [os.pipe() for _ in range(2)]
        self.outputs = (pairs[0][0], pairs[1][0])
        self.writers = (pairs[0][1], pairs[1][1])
        for file in self.outputs:
            os.set_blocking(file, False)
        self.death, self.alive = os.pipe()
        self.exchange = Exchange(self.host, self.outputs, self.death, LIMITS)

    def close(self) -> None:
        self.host.close()
        self.worker.close()
        for file in (*self.outputs, *self.writers, self.death, self.alive):
            try:
                os.close(file)
            except OSError:
                pass


@pytest.fixture
def wire() -> Iterator[Wire]:
    one = Wire()
    yield one
    one.close()


def test_an_answer_in_pieces(wire: Wire) -> None:
    wire.exchange.send(frame(b'code'), 1)
    assert wire.worker.recv(100) == b'\0\0\0\4code'
    for piece in (b'\0', b'\0\0\5', b'an', b'swe', b''):
        if piece:
            wire.worker.sendall(piece)
            wire.exchange.wait(0.1)
    assert wire.exchange.answer == b'answe'


@pytest.mark.parametrize(
    'data',
    [
        b'\xff\xff\xff\xff',
        (LIMITS.reply_bytes + 1).to_bytes(4, 'big'),
        frame(b'one') + b'x',
        frame(b'') + frame(b''),
    ],
)
def test_what_no_worker_sends(wire: Wire, data: bytes) -> None:
    wire.worker.sendall(data)
    with pytest.raises(ProtocolError):
        wire.exchange.wait(0.1)


def test_an_answer_before_the_question(wire: Wire) -> None:
    wire.worker.sendall(frame(b'forged'))
    with pytest.raises(ProtocolError, match='nobody asked for'):
        wire.exchange.begin()


def test_a_worker_that_does_not_read(wire: Wire) -> None:
    with pytest.raises(ProtocolError, match='does not read'):
        wire.exchange.send(bytes(10**7), 0.05)


def test_a_worker_that_hangs_up_or_ends(wire: Wire) -> None:
    assert not wire.exchange.dead
    os.write(wire.alive, b'x')
    wire.exchange.wait(0.1)
    assert wire.exchange.dead
    again = Exchange(wire.host, wire.outputs, -1, LIMITS)
    wire.worker.close()
    again.wait(0.1)
    assert again.dead
    third = Exchange(wire.host, wire.outputs, -1, LIMITS)
    third.send(b'code', 1)
    assert third.dead


def test_output_is_kept_from_its_beginning(wire: Wire) -> None:
    os.write(wire.writers[0], b'0123456789abc')
    os.write(wire.writers[1], b'\xff\xc3')
    wire.exchange.finish()
    assert wire.exchange.out.text == '0123456789' and wire.exchange.out.truncated
    assert wire.exchange.err.text == '\ufffd\ufffd' and not wire.exchange.err.truncated
    os.write(wire.writers[0], b'more')
    wire.exchange.wait(0.1)
    assert wire.exchange.out.count == 17 and wire.exchange.out.text == '0123456789'


def test_a_stream_that_is_closed(wire: Wire) -> None:
    os.close(wire.writers[0])
    for _ in range(3):
        wire.exchange.wait(0.02)
    assert not wire.exchange.out.open and not wire.exchange.dead


def test_draining_ends() -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    output = Output(reader, 5)
    os.write(writer, bytes(60_000))
    output.drain(most=1)
    assert output.count == 60_000
    for file in (reader, writer):
        os.close(file)
