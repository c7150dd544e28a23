"""The wire between the host and a worker: frames in, output and one answer out, all with limits."""

import os
import select
import socket

from internlm_mm.sandbox.limits import MIB, Limits
from internlm_mm.sandbox.reply import ProtocolError, clean

_PIECE = 1 << 16


def frame(data: bytes) -> bytes:
    """A message with its length before it."""
    return len(data).to_bytes(4, 'big') + data


class Output:
    """What a cell writes to one stream: the beginning is kept, all is counted.

    Args:
        file: The stream, which does not block.
        most: Bytes that are kept.
    """

    def __init__(self, file: int, most: int) -> None:
        self.file = file
        self.most = most
        self.count = 0
        self.open = True
        self._kept = bytearray()

    def drain(self, most: int = 16) -> None:
        """Take what is there, at most some pieces of it."""
        for _ in range(most):
            try:
                piece = os.read(self.file, _PIECE)
            except BlockingIOError:
                return
            if not piece:
                self.open = False
                return
            self.count += len(piece)
            self._kept += piece[: self.most - len(self._kept)]
            if len(piece) < _PIECE // 16:
                return

    @property
    def text(self) -> str:
        """What was kept."""
        return clean(bytes(self._kept).decode('utf-8', 'replace'))

    @property
    def truncated(self) -> bool:
        """Whether there was more."""
        return self.count > len(self._kept)


class Exchange:
    """One cell's traffic.

    Args:
        control: Channel to the worker.
        outputs: Files of its standard output and standard error.
        death: File that is readable when the worker has ended; -1 if there is none yet.
        limits: Of the session.
    """

    def __init__(
        self, control: socket.socket, outputs: tuple[int, int], death: int, limits: Limits
    ) -> None:
        self.control = control
        self.limits = limits
        self.dead = False
        self.answer: bytes | None = None
        self.out, self.err = (Output(file, limits.output_chars) for file in outputs)
        self._death = death
        self._buffer = bytearray()
        self._poll = select.poll()
        for file in (control.fileno(), *outputs):
            self._poll.register(file, select.POLLIN)
        if death >= 0:
            self._poll.register(death, select.POLLIN)

    def begin(self) -> None:
        """Make sure that the worker has sent nothing unasked.

        Raises:
            ProtocolError: If it has.
        """
        self.control.settimeout(0)
        try:
            stray = self.control.recv(1)
        except BlockingIOError:
            stray = None
        except OSError:
            stray = b''
        if stray:
            raise ProtocolError('an answer that nobody asked for')
        self.dead = stray == b''

    def send(self, data: bytes, seconds: float) -> None:
        """Hand the worker, which has to run, a message of any length.

        Raises:
            ProtocolError: If it does not take it.
        """
        self.control.settimeout(seconds)
        try:
            self.control.sendall(data)
        except TimeoutError:
            raise ProtocolError('the worker does not read') from None
        except OSError:
            self.dead = True
        finally:
            self.control.settimeout(0)

    def wait(self, seconds: float) -> None:
        """Take what comes, for at most so long; returns at whatever comes first.

        Raises:
            ProtocolError: If the worker sends more than an answer.
        """
        ready = {file for file, _ in self._poll.poll(max(0.0, seconds * 1000))}
        for output in (self.out, self.err):
            if output.file in ready:
                output.drain()
                if not output.open:
                    self._poll.unregister(output.file)
        if self.control.fileno() in ready:
            self._take()
        elif self._death in ready:
            self.dead = True

    def finish(self) -> None:
        """Take what is left of the output; nobody writes any more."""
        for output in (self.out, self.err):
            before = -1
            while output.open and output.count != before:
                before = output.count
                output.drain(most=self.limits.output_mb * MIB // _PIECE)
                if output.count > 2 * self.limits.output_mb * MIB:
                    break

    def _take(self) -> None:
        while self.answer is None:
            try:
                piece = self.control.recv(1 << 18)
            except BlockingIOError:
                return
            except OSError:
                piece = b''
            if not piece:
                self.dead = True
                return
            self._buffer += piece
            if len(self._buffer) < 4:
                continue
            length = int.from_bytes(self._buffer[:4], 'big')
            if length > self.limits.reply_bytes:
                raise ProtocolError(f'an answer of {length} bytes')
            if len(self._buffer) > 4 + length:
                raise ProtocolError('more than one answer')
            if len(self._buffer) == 4 + length:
                self.answer = bytes(self._buffer[4:])
