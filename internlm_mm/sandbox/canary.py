"""The first cell of every session: tries what a session must not be able to do.

Sent inside as text, and run before any cell of anybody else (proof.py judges what it prints). The
modules are those that start fastest.
"""

import _socket
import os


def blocked(name: str, attempt: object, *arguments: object) -> None:
    """Print whether an attempt fails, as it must."""
    try:
        attempt(*arguments)  # type: ignore[operator]
    except OSError as error:
        print(f'{name}: blocked ({error.errno})')
    else:
        print(f'{name}: OPEN')


def connect(family: int, address: str | tuple[str, int]) -> None:
    """Reach a service of the host's."""
    _socket.socket(family, _socket.SOCK_STREAM).connect(address)


def write(path: str) -> None:
    """Change a file of the host's."""
    with open(path, 'w') as file:
        file.write('changed')


def read(path: str) -> None:
    """Read a file of the host's."""
    with open(path) as file:
        file.read(1)


def attempt_all(secret: str, port: int, name: str, host: int, alone: bool) -> None:
    """Try it.

    Args:
        secret: A file of the host's that everybody may read and write.
        port: Of a service on the host.
        name: Of another, among sockets without files.
        host: Number of the host's process.
        alone: Whether no process but the session's may be seen.
    """
    blocked('reading a file of the host', read, secret)
    blocked('writing a file of the host', write, secret)
    blocked('making a file on the host', write, f'{secret}.new')
    blocked('reading the passwords of the host', read, '/etc/shadow')
    blocked('the network', connect, _socket.AF_INET, ('127.0.0.1', port))
    blocked('a socket of the host', connect, _socket.AF_UNIX, f'\0{name}')
    blocked('a signal to the host', os.kill, host, 0)
    blocked('another root', os.chroot, '/')
    blocked('becoming root', os.setuid, 0)
    blocked('memory outside of all counts', os.memfd_create, 'canary')
    if alone:
        seen = [entry for entry in os.listdir('/proc') if entry.isdigit()]
        print(f'processes in sight: {"blocked" if len(seen) == 1 else "OPEN"}')
    else:
        blocked('processes of the host', read, f'/proc/{host}/environ')
    held = [number for number in range(3, 64) if _is_open(number)]
    print(f'files of the host left open: {"blocked" if len(held) <= 3 else "OPEN"}')
    print(f'running as root: {"OPEN" if 0 in (os.getuid(), os.geteuid()) else "blocked"}')
    print('variables:', *sorted(vars(os)['environ']))


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
