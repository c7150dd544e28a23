"""The filter is run by an interpreter of its own here; real calls are in the attacks."""

import platform
import struct
from errno import EINVAL, ENOSYS, ENOTTY, EOPNOTSUPP, EPERM

import pytest

from internlm_mm.sandbox.seccomp import (
    ALWAYS,
    NEWEST,
    NUMBERS,
    SHARED,
    SIGNALS,
    build_filter,
    supported,
)

MACHINES = {'x86_64': 0xC000003E, 'aarch64': 0xC00000B7}
ALLOW, KILL = 'allow', 'kill'


def run(code: bytes, machine: int, number: int, *arguments: int) -> str | int:
    """What the kernel would do: 'allow', 'kill' or the error."""
    values = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack('<IIQ6Q', number, machine, 0, *(value % 2**64 for value in values))
    steps = list(struct.iter_unpack('<HBBI', code))
    place, register = 0, 0
    while True:
        kind, if_true, if_false, value = steps[place]
        place += 1
        if kind == 0x20:
            (register,) = struct.unpack_from('<I', data, value)
        elif kind == 0x54:
            register &= value
        elif kind in (0x15, 0x25, 0x45):
            true = {0x15: register == value, 0x25: register > value, 0x45: register & value}[kind]
            place += if_true if true else if_false
        else:
            assert kind == 0x06
            if value >> 16 == 0x7FFF:
                return ALLOW
            return KILL if value >> 16 == 0x8000 else value & 0xFFFF


@pytest.fixture(params=list(MACHINES))
def machine(request: pytest.FixtureRequest) -> str:
    return request.param


def number(machine: str, call: str) -> int | None:
    return NUMBERS[call][list(MACHINES).index(machine)]


def decide(machine: str, call: str, *arguments: int, **ways: bool) -> str | int | None:
    code = build_filter(**{'own_namespaces': True, **ways}, machine=machine)
    found = number(machine, call)
    return None if found is None else run(code, MACHINES[machine], found, *arguments)


@pytest.mark.parametrize('own_namespaces', [True, False])
def test_what_is_always_refused(machine: str, own_namespaces: bool) -> None:
    for call in ALWAYS:
        assert decide(machine, call, own_namespaces=own_namespaces) in (EPERM, None), call


def test_what_is_refused_beside_the_host(machine: str) -> None:
    for call in SHARED:
        assert decide(machine, call, 0, own_namespaces=False) in (EPERM, None), call
    for call in ('fchmod', 'utimensat', 'setxattr'):
        assert decide(machine, call, 1) == ALLOW, call
    assert decide(machine, 'inotify_init1', 1) == EPERM
    for call in SIGNALS:
        alone = {'own_namespaces': False, 'landlock_signals': True}
        assert decide(machine, call, own_namespaces=False) == EPERM, call
        assert decide(machine, call, **alone) == ALLOW, call


@pytest.mark.parametrize(
    ('call', 'arguments', 'answer'),
    [
        ('clone', (0x11,), ALLOW),
        ('clone', (0x3D0F00,), ALLOW),  # a thread
        *(('clone', (0x11 | 1 << bit,), EPERM) for bit in (17, 25, 26, 27, 28, 29, 30)),
        ('clone', (18,), EPERM),  # its end sends SIGCONT
        ('clone', (0x3D0F00 & ~0x400,), EPERM),  # a thread with files of its own
        ('clone', (0x4111,), ALLOW),  # vfork
        ('close_range', (3, 9, 0), ALLOW),
        ('close_range', (3, 9, 4), ALLOW),
        ('close_range', (3, 9, 2), EPERM),
        ('fcntl', (0, 3), ALLOW),
        ('fcntl', (0, 10, 18), EPERM),
        *(('fcntl', (0, lock), ALLOW) for lock in (5, 6, 7)),  # sqlite's
        *(('fcntl', (0, command), EPERM) for command in (37, 38, 1024, 1026)),
        ('flock', (0, 2), ENOSYS),
        ('mmap', (0, 4096, 3, 0x22), ALLOW),
        ('mmap', (0, 4096, 3, 0x1, 3), ALLOW),  # a file, shared
        ('mmap', (0, 4096, 3, 0x21), EPERM),
        ('mmap', (0, 4096, 3, 0x4021), EPERM),
        ('clone', (0x14F00,), EPERM),  # a thread whose maker waits for it
        ('mmap', (0, 4096, 3, 0x40022), EPERM),
        ('sendmsg', (3,), ALLOW),
        ('clone3', (1, 88), ENOSYS),
        ('socket', (1, 1), ALLOW),
        ('socket', (2, 1), EPERM),
        ('socket', (10, 2), EPERM),
        ('socket', (2 | 1 << 32, 1), EPERM),
        ('socketpair', (1, 1), ALLOW),
        ('socketpair', (1, 1 | 0o2000000), ALLOW),
        ('socketpair', (1, 2), EPERM),
        ('socketpair', (1, 2 | 0o2000000), EPERM),
        ('ioctl', (0, 0x5401), ALLOW),
        ('ioctl', (0, 0x5412), EPERM),
        ('ioctl', (0, 0x5412 | 1 << 33), EPERM),  # the kernel looks at the lower half only
        ('ioctl', (0, 0x541C), EPERM),
        ('prctl', (15,), ALLOW),
        ('prctl', (4, 0), EPERM),
        ('prctl', (22, 2), EPERM),
        ('prctl', (78, 1, 1 << 30), EINVAL),  # a table of futexes
        ('prctl', (0x53564D41, 0), EINVAL),
        ('splice', (3,), ENOSYS),
        ('sendfile', (3, 4), ENOSYS),
        ('ioctl', (3, 0x8912), ALLOW),  # in a network of its own
        ('prctl', (1, 0), EPERM),  # to live on when the parent dies
        ('ioctl', (0, 0x541B), ALLOW),  # how much there is to read
        ('ioctl', (0, 0x40086602), ENOTTY),  # attributes of a file
        ('ioctl', (0, 0x401C5820), ENOTTY),
        ('ioctl', (0, 0x40806685), ENOTTY),  # a seal on a file
        ('ioctl', (0, 0x50009401), EOPNOTSUPP),  # a copy of a whole tree
        ('setsockopt', (3, 1, 20), ALLOW),
        ('setsockopt', (3, 1, 7), EPERM),
        ('getxattr', (1, 1), ALLOW),
        ('bind', (3, 1), ALLOW),
        ('personality', (0xFFFFFFFF,), ALLOW),
        ('personality', (0x40000,), EPERM),
        ('setrlimit', (7,), ALLOW),
        ('setrlimit', (4,), EPERM),
        ('prlimit64', (0, 7, 1 << 40), ALLOW),
        ('prlimit64', (0, 4, 0), ALLOW),
        ('prlimit64', (0, 4, 0x1000), EPERM),
        ('prlimit64', (0, 4, 1 << 40), EPERM),
    ],
)
def test_by_arguments(machine: str, call: str, arguments: tuple[int, ...], answer: object) -> None:
    assert decide(machine, call, *arguments) == answer


@pytest.mark.parametrize(
    ('call', 'arguments', 'answer'),
    [
        ('prlimit64', (0, 7, 1 << 40), ALLOW),
        ('prlimit64', (4711, 7, 1 << 40), EPERM),
        ('sched_setaffinity', (0,), ALLOW),
        ('sched_setaffinity', (4711,), EPERM),
        ('setpriority', (0, 0), ALLOW),
        ('setpriority', (0, 4711), EPERM),
        ('setpriority', (2, 0), EPERM),
        ('fcntl', (3, 1), ALLOW),
        ('fcntl', (3, 8), EPERM),
        ('socket', (1, 1), EPERM),
        *(('ioctl', (3, command), ENOTTY) for command in (0x8901, 0x8902, 0x8912, 0x8927)),
        *((call, (1, 1), EOPNOTSUPP) for call in ('getxattr', 'llistxattr')),
    ],
)
def test_by_arguments_beside_the_host(
    machine: str, call: str, arguments: tuple[int, ...], answer: object
) -> None:
    assert decide(machine, call, *arguments, own_namespaces=False) == answer


def test_other_machines_and_unknown_calls(machine: str) -> None:
    code = build_filter(True, machine=machine)
    here = MACHINES[machine]
    assert run(code, 0x40000003, 0) == KILL  # 32-bit x86, whose numbers are others
    assert run(code, here, 0x40000000 | 1) == KILL  # x32
    assert run(code, here, NEWEST) == ALLOW
    for unknown in (NEWEST + 1, 467, 0x3FFFFFFF):
        assert run(code, here, unknown) == ENOSYS
    known = {one for one in (number(machine, call) for call in NUMBERS) if one is not None}
    for other in set(range(NEWEST + 1)) - known:
        assert run(code, here, other, 1, 2, 3) == ALLOW


def test_numbers_are_those_of_this_machine() -> None:
    names = {'x86_64': 'asm/unistd_64.h', 'aarch64': 'asm-generic/unistd.h'}
    here = platform.machine()
    roots = ('/usr/include', f'/usr/include/{here}-linux-gnu')
    for root in roots:
        try:
            with open(f'{root}/{names[here]}') as file:
                lines = [line.split() for line in file if line.startswith('#define __NR')]
        except (OSError, KeyError):
            continue
        told = {
            line[1].removeprefix('__NR_').removeprefix('__NR3264_'): int(line[2])
            for line in lines
            if len(line) > 2 and line[2].isdigit()
        }
        for call in NUMBERS:
            if call in told:
                assert number(here, call) == told[call], call
        return
    pytest.skip('no headers of the kernel here (apt install linux-libc-dev)')


def test_machines_that_are_not_known() -> None:
    assert supported('x86_64') and not supported('riscv64')
    with pytest.raises(ValueError, match='riscv64'):
        build_filter(True, machine='riscv64')
