"""The host's side of the canary: traps that a session must not reach, and the judgement."""

import os
import socket
from collections.abc import Collection
from pathlib import Path

_SECRET = 'of the host'
_FEWEST = 13


class Traps:
    """A file, a port and a socket of the host's that any ordinary process of it could reach.

    Args:
        folder: Where the file is; everybody may enter it.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / 'canary'
        self._file.write_text(_SECRET)
        self._file.chmod(0o666)
        self._tcp = socket.create_server(('127.0.0.1', 0))
        self._name = f'internlm_mm-{os.urandom(8).hex()}'
        self._unix = socket.socket(socket.AF_UNIX)
        self._unix.bind(f'\0{self._name}')
        self._unix.listen()
        for trap in (self._tcp, self._unix):
            trap.setblocking(False)
        source = Path(__file__).with_name('canary.py').read_text(encoding='utf-8')
        self._source = source

    def cell(self, alone: bool) -> str:
        """The code that tries to reach them.

        Args:
            alone: Whether the session must see no process but its own.
        """
        port = self._tcp.getsockname()[1]
        return (
            f'{self._source}\n\nattempt_all({str(self._file)!r}, {port}, {self._name!r}, '
            f'{os.getpid()}, {alone})\n'
        )

    def judge(self, printed: str, variables: Collection[str]) -> str | None:
        """What a session could do that it must not, None if it proved that it cannot.

        Args:
            printed: By the code of `cell`.
            variables: Names of those that a session may see.
        """
        lines = printed.splitlines()
        opened = [line.partition(':')[0] for line in lines if line.endswith('OPEN')]
        if opened:
            return f'open: {", ".join(opened)}'
        if sum('blocked' in line for line in lines) < _FEWEST:
            return f'the canary did not come to its end: {printed[-500:]!r}'
        names = lines[-1].removeprefix('variables:').split()
        if extra := set(names) - {*variables, 'PWD', 'LC_CTYPE'}:
            return f'variables of the host are seen: {", ".join(sorted(extra))}'
        if self._file.read_text() != _SECRET or self._file.with_name('canary.new').exists():
            return 'a file of the host was changed'
        for trap in (self._tcp, self._unix):
            try:
                trap.accept()[0].close()
            except BlockingIOError:
                continue
            return 'a service of the host was reached'
        return None

    def close(self) -> None:
        """Take them away; the file goes with its folder."""
        self._tcp.close()
        self._unix.close()
