"""A filter of system calls, as the kernel's BPF: what no program of a chat needs is refused.

The filter is a list of what is refused, so it is no wall by itself. It takes away doors that
kernels have had faults behind, and what namespaces and Landlock do not cover.
"""

import platform
import struct
from errno import EINVAL, ENOSYS, ENOTTY, EOPNOTSUPP, EPERM
from functools import cache
from typing import NamedTuple


class Rule(NamedTuple):
    """A system call that is refused if one of its arguments is so.

    Attributes:
        call: Its name.
        argument: Index of the argument.
        test: 'equal', 'other' or 'any bit', of the lower half of the argument.
        value: What it is compared with.
        mask: Bits of the argument that are looked at.
        error: What the caller is told.
    """

    call: str
    argument: int
    test: str
    value: int
    mask: int = 0xFFFFFFFF
    error: int = EPERM


_AF_UNIX, _SOCK_STREAM = 1, 1
_NEW_NAMESPACES = 0x7E020000
_THREAD, _SAME_FILES, _WAIT = 0x10000, 0x400, 0x4000
_SHARED_MEMORY = 0x21  # MAP_SHARED, MAP_ANONYMOUS
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _RLIMIT_CORE = 1, 4, 22, 4

ALWAYS = (
    *'mount umount2 pivot_root move_mount open_tree fsopen fsmount fsconfig fspick'.split(),
    *'mount_setattr setns unshare chroot swapon swapoff reboot acct quotactl quotactl_fd'.split(),
    *'ptrace process_vm_readv process_vm_writev kcmp pidfd_getfd process_madvise'.split(),
    *'process_mrelease keyctl add_key request_key bpf perf_event_open userfaultfd'.split(),
    *'io_uring_setup io_uring_enter io_uring_register io_setup kexec_load'.split(),
    *'kexec_file_load init_module finit_module delete_module nfsservctl iopl ioperm'.split(),
    *'modify_ldt uselib ustat sysfs _sysctl open_by_handle_at name_to_handle_at'.split(),
    *'lookup_dcookie syslog settimeofday clock_settime clock_adjtime adjtimex'.split(),
    *'vhangup sethostname setdomainname fanotify_init vmsplice migrate_pages'.split(),
    # A user has few of these on the whole machine.
    *'inotify_init inotify_init1 inotify_add_watch'.split(),
    # Memory that belongs to no process and no folder, which nobody would count.
    *'move_pages memfd_create memfd_secret shmget msgget semget mq_open'.split(),
    # What the host has of that kind is reached by number, without asking for it by name first.
    *'shmat shmctl semop semtimedop semctl msgsnd msgrcv msgctl mq_unlink'.split(),
    # Rules keep deleted files alive that no process holds open.
    *'landlock_create_ruleset landlock_add_rule landlock_restrict_self'.split(),
    'timer_create',  # wakes with SIGCONT whom the host has stopped
    'seccomp',  # its listeners keep threads waiting that cannot be stopped
    *'sync syncfs'.split(),  # the disks of the host
)
"""Calls that are refused whatever their arguments."""

ALWAYS_RULES = (
    Rule('clone', 0, 'any bit', _NEW_NAMESPACES),
    Rule('clone', 0, 'any bit', 0xEE),  # the signal of its end: SIGCHLD or none, never SIGCONT
    # A thread with files of its own could hide them, as could one that parts from the others'.
    Rule('clone', 0, 'equal', _THREAD, mask=_THREAD | _SAME_FILES),
    Rule('close_range', 2, 'any bit', 2),
    Rule('clone', 0, 'equal', _THREAD | _WAIT, mask=_THREAD | _WAIT),  # cannot be stopped either
    # Shared memory without a file: it is held by a page, and counts with that.
    Rule('mmap', 3, 'equal', _SHARED_MEMORY, mask=_SHARED_MEMORY),
    Rule('fcntl', 1, 'equal', 10),  # F_SETSIG: SIGCONT again
    Rule('fcntl', 1, 'equal', 37),  # F_OFD_SETLK: a lock that belongs to no process is not counted
    Rule('fcntl', 1, 'equal', 38),  # F_OFD_SETLKW
    Rule('fcntl', 1, 'equal', 1024),  # F_SETLEASE: also on files of the host that can be read
    Rule('fcntl', 1, 'equal', 1026),  # F_NOTIFY: likewise
    # Likewise; libraries take it that the file system has no such locks.
    Rule('flock', 0, 'any bit', 0, error=ENOSYS),
    Rule('mmap', 3, 'any bit', 0x40000),  # huge pages, which nobody counts
    Rule('clone3', 0, 'any bit', 0, error=ENOSYS),  # its flags are out of sight: libc takes clone
    Rule('personality', 0, 'other', 0xFFFFFFFF),  # which only asks
    Rule('socket', 0, 'other', _AF_UNIX),
    Rule('socketpair', 0, 'other', _AF_UNIX),
    Rule('socketpair', 1, 'other', _SOCK_STREAM, mask=0xF),  # a datagram can be sent anywhere
    Rule('ioctl', 1, 'equal', 0x5412),  # TIOCSTI: types into a terminal
    Rule('ioctl', 1, 'equal', 0x541C),  # TIOCLINUX: likewise
    # What file systems do besides: attributes, seals, keys, and copies of whole trees, in which
    # everything of the host's would be that lies on the same disk.
    Rule('ioctl', 1, 'equal', 0x6600, mask=0xFF00, error=ENOTTY),
    Rule('ioctl', 1, 'equal', 0x5800, mask=0xFF00, error=ENOTTY),
    Rule('ioctl', 1, 'equal', 0x9400, mask=0xFF00, error=EOPNOTSUPP),
    # How much a socket holds: the host counts sockets, not bytes.
    Rule('setsockopt', 2, 'equal', 7),
    # A process that hides from its parent could hide files that it has deleted but holds open.
    Rule('prctl', 0, 'equal', _PR_SET_DUMPABLE),
    # A session ends with its host, also with one that is killed.
    Rule('prctl', 0, 'equal', _PR_SET_PDEATHSIG),
    Rule('prctl', 0, 'equal', _PR_SET_SECCOMP),
    # Newer ones: a table for futexes, for one, as large as one likes.
    Rule('prctl', 0, 'any bit', 0xFFFFFFC0, error=EINVAL),
    # Pages of files that are cut short or deleted live on in pipes; libraries copy without.
    *(Rule(call, 0, 'any bit', 0, error=ENOSYS) for call in ('splice', 'tee', 'sendfile')),
    # A handler of core dumps runs as root outside; a limit of 1 byte keeps it out, 0 does not.
    Rule('setrlimit', 0, 'equal', _RLIMIT_CORE),
)

SHARED = (
    *'chmod fchmod fchmodat chown fchown lchown fchownat utime utimes futimesat utimensat'.split(),
    *'setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr'.split(),
    *'socket bind connect listen'.split(),  # two ends of a pair may have names, too
    *'sendmsg sendmmsg'.split(),  # a file on its way to somebody is in no process, deleted or not
)
"""Calls that are also refused where a session sees the host's files: Landlock lets them pass."""

SHARED_RULES = (
    # What any socket tells of the host's network, and whom the kernel signals for it.
    Rule('ioctl', 1, 'equal', 0x8900, mask=0xFF00, error=ENOTTY),
    # More than names and sizes; libraries take it that the file system has none.
    *(
        Rule(call, 0, 'any bit', 0, error=EOPNOTSUPP)
        for call in 'getxattr lgetxattr listxattr llistxattr'.split()
    ),
    *(
        Rule(call, 0, 'other', 0)  # of another process than the caller
        for call in (
            *'prlimit64 sched_setaffinity sched_setscheduler sched_setattr'.split(),
            'sched_setparam',
        )
    ),
    Rule('setpriority', 0, 'other', 0),
    Rule('setpriority', 1, 'other', 0),
    Rule('ioprio_set', 0, 'other', 1),
    Rule('ioprio_set', 1, 'other', 0),
)

SIGNALS = (*'kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_send_signal'.split(),)
"""Calls that are also refused where Landlock does not keep signals inside."""

SIGNAL_RULES = (
    Rule('fcntl', 1, 'equal', 8),  # F_SETOWN: whom the kernel signals
    Rule('fcntl', 1, 'equal', 15),  # F_SETOWN_EX
)

NEWEST = 450
"""The newest call that this list was made with; newer ones do not exist for a session."""

# Number on x86-64 and on 64-bit ARM, None where it does not exist.
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    '_sysctl': (156, None),
    'acct': (163, 89),
    'add_key': (248, 217),
    'adjtimex': (159, 171),
    'bind': (49, 200),
    'bpf': (321, 280),
    'chmod': (90, None),
    'chown': (92, None),
    'chroot': (161, 51),
    'clock_adjtime': (305, 266),
    'clock_settime': (227, 112),
    'clone': (56, 220),
    'clone3': (435, 435),
    'close_range': (436, 436),
    'connect': (42, 203),
    'delete_module': (176, 106),
    'fanotify_init': (300, 262),
    'fchmod': (91, 52),
    'fchmodat': (268, 53),
    'fchown': (93, 55),
    'fchownat': (260, 54),
    'fcntl': (72, 25),
    'finit_module': (313, 273),
    'flock': (73, 32),
    'fremovexattr': (199, 16),
    'fsconfig': (431, 431),
    'fsetxattr': (190, 7),
    'fsmount': (432, 432),
    'fsopen': (430, 430),
    'fspick': (433, 433),
    'futimesat': (261, None),
    'getxattr': (191, 8),
    'init_module': (175, 105),
    'inotify_add_watch': (254, 27),
    'inotify_init': (253, None),
    'inotify_init1': (294, 26),
    'io_setup': (206, 0),
    'io_uring_enter': (426, 426),
    'io_uring_register': (427, 427),
    'io_uring_setup': (425, 425),
    'ioctl': (16, 29),
    'ioperm': (173, None),
    'iopl': (172, None),
    'ioprio_set': (251, 30),
    'kcmp': (312, 272),
    'kexec_file_load': (320, 294),
    'kexec_load': (246, 104),
    'keyctl': (250, 219),
    'kill': (62, 129),
    'landlock_add_rule': (445, 445),
    'landlock_create_ruleset': (444, 444),
    'landlock_restrict_self': (446, 446),
    'lchown': (94, None),
    'lgetxattr': (192, 9),
    'listen': (50, 201),
    'listxattr': (194, 11),
    'llistxattr': (195, 12),
    'lookup_dcookie': (212, 18),
    'lremovexattr': (198, 15),
    'lsetxattr': (189, 6),
    'memfd_create': (319, 279),
    'memfd_secret': (447, 447),
    'migrate_pages': (256, 238),
    'mmap': (9, 222),
    'modify_ldt': (154, None),
    'mount': (165, 40),
    'mount_setattr': (442, 442),
    'move_mount': (429, 429),
    'move_pages': (279, 239),
    'mq_open': (240, 180),
    'mq_unlink': (241, 181),
    'msgctl': (71, 187),
    'msgget': (68, 186),
    'msgrcv': (70, 188),
    'msgsnd': (69, 189),
    'name_to_handle_at': (303, 264),
    'nfsservctl': (180, 42),
    'open_by_handle_at': (304, 265),
    'open_tree': (428, 428),
    'perf_event_open': (298, 241),
    'personality': (135, 92),
    'pidfd_getfd': (438, 438),
    'pidfd_send_signal': (424, 424),
    'pivot_root': (155, 41),
    'prctl': (157, 167),
    'prlimit64': (302, 261),
    'process_madvise': (440, 440),
    'process_mrelease': (448, 448),
    'process_vm_readv': (310, 270),
    'process_vm_writev': (311, 271),
    'ptrace': (101, 117),
    'quotactl': (179, 60),
    'quotactl_fd': (443, 443),
    'reboot': (169, 142),
    'removexattr': (197, 14),
    'request_key': (249, 218),
    'rt_sigqueueinfo': (129, 138),
    'rt_tgsigqueueinfo': (297, 240),
    'sched_setaffinity': (203, 122),
    'sched_setattr': (314, 274),
    'sched_setparam': (142, 118),
    'sched_setscheduler': (144, 119),
    'seccomp': (317, 277),
    'semctl': (66, 191),
    'semget': (64, 190),
    'semop': (65, 193),
    'semtimedop': (220, 192),
    'sendfile': (40, 71),
    'sendmmsg': (307, 269),
    'sendmsg': (46, 211),
    'setdomainname': (171, 162),
    'sethostname': (170, 161),
    'setns': (308, 268),
    'setpriority': (141, 140),
    'setrlimit': (160, 164),
    'setsockopt': (54, 208),
    'settimeofday': (164, 170),
    'setxattr': (188, 5),
    'shmat': (30, 196),
    'shmctl': (31, 195),
    'shmget': (29, 194),
    'socket': (41, 198),
    'socketpair': (53, 199),
    'splice': (275, 76),
    'swapoff': (168, 225),
    'swapon': (167, 224),
    'sync': (162, 81),
    'syncfs': (306, 267),
    'sysfs': (139, None),
    'syslog': (103, 116),
    'tee': (276, 77),
    'tgkill': (234, 131),
    'timer_create': (222, 107),
    'tkill': (200, 130),
    'umount2': (166, 39),
    'unshare': (272, 97),
    'uselib': (134, None),
    'userfaultfd': (323, 282),
    'ustat': (136, None),
    'utime': (132, None),
    'utimensat': (280, 88),
    'utimes': (235, None),
    'vhangup': (153, 58),
    'vmsplice': (278, 75),
}

_MACHINES = {'x86_64': (0, 0xC000003E), 'aarch64': (1, 0xC00000B7)}
_X32 = 0x40000000

_LOAD, _AND = 0x20, 0x54
_IF_EQUAL, _IF_MORE, _IF_BIT = 0x15, 0x25, 0x45
_RETURN = 0x06
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _MACHINE, _ARGUMENTS = 0, 4, 16


def supported(machine: str | None = None) -> bool:
    """Whether the numbers of system calls of this machine are known."""
    return (machine or platform.machine()) in _MACHINES


@cache
def build_filter(
    own_namespaces: bool, landlock_signals: bool = False, machine: str | None = None
) -> bytes:
    """The filter as an array of the kernel's `struct sock_filter`.

    Args:
        own_namespaces: False where a session shares processes and files with the host.
        landlock_signals: Whether Landlock keeps signals inside; asked if namespaces do not.
        machine: As `platform.machine()` has it; this machine when None.

    Raises:
        ValueError: On machines whose numbers are not known.
    """
    machine = machine or platform.machine()
    if machine not in _MACHINES:
        raise ValueError(f'no filter of system calls for {machine}, only for {list(_MACHINES)}')
    column, architecture = _MACHINES[machine]
    calls: list[str] = [*ALWAYS]
    rules = [*ALWAYS_RULES]
    if not own_namespaces:
        calls += SHARED
        rules += SHARED_RULES
        if not landlock_signals:
            calls += SIGNALS
            rules += SIGNAL_RULES
    code = [
        _step(_LOAD, _MACHINE),
        _step(_IF_EQUAL, architecture, 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
        _step(_IF_MORE, _X32 - 1, 0, 1),
        _step(_RETURN, _KILL),
        _step(_IF_MORE, NEWEST, 0, 1),
        _step(_RETURN, _ERROR | ENOSYS),
    ]
    for call in calls:
        number = NUMBERS[call][column]
        if number is not None:
            code += [_step(_IF_EQUAL, number, 0, 1), _step(_RETURN, _ERROR | EPERM)]
    for rule in rules:
        number = NUMBERS[rule.call][column]
        if number is not None:
            code += _rule(rule, number)
    code += _core_limit(NUMBERS['prlimit64'][column])
    code.append(_step(_RETURN, _ALLOW))
    return b''.join(code)


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack('=HBBI', code, if_true, if_false, value)


def _rule(rule: Rule, number: int) -> list[bytes]:
    offset = _ARGUMENTS + 8 * rule.argument  # little-endian, both machines
    refuse = [_step(_RETURN, _ERROR | rule.error)]
    body = [_step(_LOAD, offset), _step(_AND, rule.mask)]
    if rule.test == 'equal':
        body += [_step(_IF_EQUAL, rule.value, 0, 1), *refuse]
    elif rule.test == 'other':
        body += [_step(_IF_EQUAL, rule.value, 1, 0), *refuse]
    elif rule.value:
        body += [_step(_IF_BIT, rule.value, 0, 1), *refuse]
    else:
        body = refuse
    body.append(_step(_LOAD, _NUMBER))
    return [_step(_IF_EQUAL, number, 0, len(body)), *body]


def _core_limit(number: int | None) -> list[bytes]:
    """`prlimit64` may not set the limit of core dumps; it may ask for it, with a null pointer."""
    assert number is not None
    resource, new = _ARGUMENTS + 8, _ARGUMENTS + 16
    body = [
        _step(_LOAD, resource),
        _step(_IF_EQUAL, _RLIMIT_CORE, 0, 5),
        _step(_LOAD, new),
        _step(_IF_EQUAL, 0, 0, 2),
        _step(_LOAD, new + 4),
        _step(_IF_EQUAL, 0, 1, 0),
        _step(_RETURN, _ERROR | EPERM),
        _step(_LOAD, _NUMBER),
    ]
    return [_step(_IF_EQUAL, number, 0, len(body)), *body]
