"""The ways to confine a session, and which of them this machine has."""

import os
import platform
import pwd
import random
import re
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import which

from internlm_mm.sandbox.confine import OLDEST, SCOPES, descendants, landlock_version
from internlm_mm.sandbox.environment import Python
from internlm_mm.sandbox.limits import MIB, Limits
from internlm_mm.sandbox.process import RUNNING, Command, state
from internlm_mm.sandbox.seccomp import build_filter, supported
from internlm_mm.utils.suggest import did_you_mean

INSTALL = 'apt install bubblewrap (dnf, pacman, apk: the same name)'

NAMES = ('bubblewrap', 'landlock', 'plain')
"""Backends, the strongest first; `plain` confines nothing and has to be asked for by name."""

# Numbers of users that no system gives to anybody, and those of systemd's transient services.
_USERS = ((1_879_048_192, 2_147_483_647), (61_184, 65_520))
_INSIDE = '/run/sandbox'
_CONTROL = '{control}'
# Of /proc: they tell of the host.
_HIDDEN = (
    *'bootconfig cmdline consoles diskstats kallsyms key-users keys modules partitions'.split(),
    'timer_list',
)


class SandboxError(RuntimeError):
    """The sandbox cannot do what it is asked for; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What sessions are started with.

    Attributes:
        python: The interpreter that runs cells.
        folder: Folder with compiled copies of `worker.py` and `confine.py`, readable by everyone.
        limits: Of every session.
    """

    python: Python
    folder: Path
    limits: Limits

    def worker(self, folder: str, processes: int) -> list[str]:
        """The worker's file and arguments, without the number of the control channel."""
        limits = self.limits
        kernel = {
            resource.RLIMIT_AS: limits.memory_mb * MIB,
            resource.RLIMIT_CPU: 24 * 3600,
            resource.RLIMIT_FSIZE: limits.file_mb * MIB,
            resource.RLIMIT_NOFILE: limits.open_files,
            resource.RLIMIT_NPROC: processes,
            resource.RLIMIT_MEMLOCK: 0,
            resource.RLIMIT_SIGPENDING: 256,
            resource.RLIMIT_RTPRIO: 0,
            resource.RLIMIT_NICE: 0,
        }
        image = limits.image_mb * MIB
        return [
            f'{folder}/worker.pyc',
            _CONTROL,
            *map(str, (limits.output_chars, limits.images, image)),
            *(f'{kind}={value}' for kind, value in kernel.items()),
        ]

    def environment(self, home: str, temporary: str, packages: Sequence[str]) -> dict[str, str]:
        """All variables that a cell sees."""
        return {
            'PATH': f'{Path(self.python.executable).parent}:/usr/bin:/bin',
            'HOME': home,
            'TMPDIR': temporary,
            'MPLCONFIGDIR': f'{temporary}/.matplotlib',
            'XDG_CACHE_HOME': f'{temporary}/.cache',
            'MPLBACKEND': 'Agg',
            'LANG': 'C.UTF-8',
            'PYTHONPATH': os.pathsep.join(packages),
            'PYTHONSAFEPATH': '1',
            'PYTHONDONTWRITEBYTECODE': '1',
            **{f'{name}_NUM_THREADS': '1' for name in ('OMP', 'OPENBLAS', 'MKL', 'NUMEXPR')},
        }

    @property
    def interpreter(self) -> list[str]:
        """The interpreter and its options."""
        return [self.python.executable, '-s', '-S', '-B']


def missing(backend: str) -> str | None:
    """Why this machine cannot use a backend, as far as can be seen without starting it.

    Args:
        backend: One of `NAMES`.

    Returns:
        The reason, None if there is none.
    """
    if sys.platform != 'linux':
        return f'it needs Linux, and this is {sys.platform}'
    if not Path(f'/proc/self/task/{os.getpid()}/children').exists():
        return 'it needs /proc with lists of children (CONFIG_PROC_CHILDREN)'
    if backend == 'plain':
        return None
    if not supported():
        return f'no numbers of system calls are known for {platform.machine()}'
    if backend == 'bubblewrap' and which('bwrap') is None:
        return f'bwrap is not installed: {INSTALL}'
    if backend == 'bubblewrap' and which('prlimit') is None:
        return 'prlimit is not installed: apt install util-linux'
    if backend == 'landlock':
        version = landlock_version()
        if version == 0:
            return 'this kernel has no Landlock, or it is switched off (lsm=landlock,...)'
        if version < OLDEST:
            return f'Landlock {version} of this kernel is too old: {OLDEST} since Linux 6.2'
    return None


def check_name(backend: str, names: Sequence[str]) -> None:
    """Refuse a backend that there is not."""
    if backend not in names:
        raise ValueError(f'backend={backend!r} is unknown.{did_you_mean(backend, names)}')


def check_owner(process: int) -> None:
    """Refuse a copy of the process that made a sandbox: both would talk to the same sessions."""
    if os.getpid() != process:
        raise SandboxError(
            f'sandbox: process {process} made it, and this is a copy of that (fork): make a '
            'sandbox of its own here'
        )


def choose_user() -> int | None:
    """A number of a user that nobody is, for one session; None where we are no root.

    Raises:
        SandboxError: If this machine's root may not become any such user.
    """
    if os.getuid() != 0:
        return None
    ranges = Path('/proc/self/uid_map').read_text().splitlines()
    mapped = [tuple(map(int, line.split())) for line in ranges]
    taken = {entry.pw_uid for entry in pwd.getpwall()}
    for low, high in _USERS:
        for first, _, count in mapped:
            if first <= low and high <= first + count:
                free = random.SystemRandom().randrange(low, high)
                while free in taken:
                    free = random.SystemRandom().randrange(low, high)
                return free
    raise SandboxError(
        'sandbox: started as root where no other user is mapped (/proc/self/uid_map): sessions '
        'would run as root. Start it as an ordinary user'
    )


def bubblewrap(tools: Tools, features: frozenset[str]) -> Command:
    """A session in namespaces of its own.

    Args:
        tools: What it is started with.
        features: Options that this machine's bwrap has; see `bubblewrap_features`.
    """
    limits, python = tools.limits, tools.python
    options = [
        *'--unshare-all --unshare-user --die-with-parent --new-session --cap-drop ALL'.split(),
        *'--uid 1000 --gid 1000 --hostname sandbox --clearenv'.split(),
        # A process of bwrap's inside could be written to by the worker, which has the same user,
        # and has none of its limits.
        '--as-pid-1',
    ]
    if '--disable-userns' in features:
        options.append('--disable-userns')
    options += ['--ro-bind', '/usr', '/usr']
    for hidden in ('/usr/local', '/usr/src'):
        if Path(hidden).is_dir() and not f'{python.base}/'.startswith(f'{hidden}/'):
            options += ['--tmpfs', hidden, '--remount-ro', hidden]
    for name in ('/bin', '/lib', '/lib64'):
        if os.path.islink(name):
            options += ['--symlink', os.readlink(name), name]
        else:
            options += ['--ro-bind-try', name, name]
    for path in ('/etc/ld.so.cache', '/etc/fonts'):
        options += ['--ro-bind-try', path, path]
    if not f'{python.base}/'.startswith('/usr/'):
        options += ['--ro-bind', python.base, python.base]
    packages = [f'{_INSIDE}-packages/{i}' for i in range(len(python.packages))]
    for outside, inside in zip(python.packages, packages, strict=True):
        options += ['--ro-bind', outside, inside]
    options += ['--ro-bind', str(tools.folder), _INSIDE, '--proc', '/proc', '--tmpfs', '/dev']
    # No /dev/zero: who maps it has memory that nobody counts.
    for name in ('null', 'full', 'random', 'urandom'):
        options += ['--dev-bind', f'/dev/{name}', f'/dev/{name}']
    for target, name in (('fd', ''), ('fd/0', 'stdin'), ('fd/1', 'stdout'), ('fd/2', 'stderr')):
        options += ['--symlink', f'/proc/self/{target}', f'/dev/{name or "fd"}']
    for name in _HIDDEN:
        if Path(f'/proc/{name}').exists():
            options += ['--ro-bind', '/dev/null', f'/proc/{name}']
    # Of its own processes, too: who is killed when memory runs out, for one.
    options += ['--remount-ro', '/proc']
    # One file system for all that can be written, so that one size holds for all.
    options += ['--symlink', '/work/.shm', '/dev/shm', '--symlink', '/work/.tmp', '/tmp']
    options += ['--remount-ro', '/dev']
    if '--size' in features:
        options += ['--size', str(limits.disk_mb * MIB)]
    options += ['--tmpfs', '/work', '--dir', '/work/.tmp', '--dir', '/work/.shm']
    options += ['--chdir', '/work', '--remount-ro', '/']
    for name, value in tools.environment('/work', '/tmp', packages).items():
        options += ['--setenv', name, value]
    user = choose_user()
    program = which('bwrap') or 'bwrap'
    worker = tools.worker(_INSIDE, _processes(user, limits, own=_counts_by_namespace()))
    # A handler of core dumps runs outside, as root. The kernel calls none if the limit is 1 byte;
    # the filter of system calls lets nobody set it to 0, at which it would.
    core = (
        [which('prlimit') or 'prlimit', '--core=1:1']
        if resource.getrlimit(resource.RLIMIT_CORE)[1]
        else []
    )

    def arguments(lifeline: int, control: int, code: int) -> Sequence[str]:  # noqa: ARG001
        # The lifeline is Landlock's; bwrap ends with its parent by itself.
        filtered = ['--seccomp', str(code)]
        own = _told(worker, control)
        return [*core, program, *options, *filtered, '--', *tools.interpreter, *own]

    return Command(
        arguments=arguments,
        environment={'PATH': '/usr/bin:/bin:/usr/local/bin'},
        user=user,
        filter=build_filter(own_namespaces=True),
        depth=1,
        variables=frozenset(tools.environment('', '', ())),
    )


def bubblewrap_features() -> frozenset[str]:
    """Options that this machine's bwrap has: older ones cannot limit the size of a folder."""
    shown = subprocess.run(['bwrap', '--help'], capture_output=True, text=True, check=False)
    return frozenset(re.findall(r'--[a-z-]+', shown.stdout + shown.stderr))


def landlock(tools: Tools, scratch: Path, version: int) -> Command:
    """A session that sees the host's processes and names of files, and may open its own only.

    Args:
        tools: What it is started with.
        scratch: Its folder, which it alone may write to.
        version: Of Landlock; 0 for a session that is not confined at all.
    """
    user = choose_user()
    temporary = scratch / 'tmp'
    # Made here, because fontconfig sets the mode of what it makes, and nobody may do that inside.
    cache = temporary / '.cache/fontconfig'
    cache.mkdir(mode=0o700, parents=True)
    for folder in (scratch, temporary, cache.parent, cache):
        if user is not None:
            os.chown(folder, user, user)
    writable = [str(scratch), '/dev/null', '/dev/full']
    python = tools.python
    readable = [str(tools.folder), '/dev/random', '/dev/urandom', python.base, *python.packages]
    if python.base == '/usr':
        readable.remove('/usr')  # not all of it: /usr/local may hold anything
    readable += ['/usr/bin', '/usr/lib', '/usr/lib64', '/usr/libexec', '/usr/share']
    readable += ['/bin', '/lib', '/lib64', '/etc/ld.so.cache', '/etc/fonts']
    paths = [*writable, '', *(path for path in dict.fromkeys(readable) if os.path.exists(path))]
    worker = tools.worker(str(tools.folder), _processes(user, tools.limits, own=False))
    confine = f'{tools.folder}/confine.pyc'

    def arguments(lifeline: int, control: int, code: int) -> Sequence[str]:
        numbers = [lifeline, control, code, version]
        own = _told(worker, control)
        return [*tools.interpreter, confine, *map(str, numbers), *paths, '--', *own]

    code = build_filter(own_namespaces=False, landlock_signals=version >= SCOPES)
    return Command(
        arguments=arguments,
        environment=tools.environment(str(scratch), str(temporary), python.packages),
        user=user,
        filter=code if version else b'',
        depth=1,
        variables=frozenset(tools.environment('', '', ())),
        scratch=str(scratch),
    )


def _told(worker: Sequence[str], control: int) -> list[str]:
    """The worker's file and arguments, with the number of the control channel."""
    return [str(control) if part == _CONTROL else part for part in worker]


def _processes(user: int | None, limits: Limits, own: bool) -> int:
    """The kernel's limit of processes: it counts all of a user, which root's sessions have alone.

    Args:
        user: The session's own, if it has one.
        limits: Of the session.
        own: Whether the kernel counts those of the session's namespace only.
    """
    others = 0 if own or user is not None else _count_threads(os.getuid())
    return others + limits.processes


def _counts_by_namespace(release: str | None = None) -> bool:
    """Whether this kernel counts processes by namespace: since Linux 5.14."""
    numbers = re.findall(r'\d+', release or platform.release())
    return tuple(map(int, numbers[:2])) >= (5, 14)


def _count_threads(user: int, root: str = '/proc') -> int:
    """Threads of a user on this machine; of our sessions two each, however many they have.

    What a session has beyond that, and what is left of it when it is killed, would otherwise be
    given to the next one on top of its limit.
    """
    count = 0
    sessions = set(RUNNING)
    inside = {one for first in sessions for one in descendants(first)} | sessions
    for name in os.listdir(root):
        if name.isdigit() and int(name) not in inside:
            try:
                if os.stat(f'{root}/{name}').st_uid == user and not _is_gone(f'{root}/{name}/stat'):
                    count += len(os.listdir(f'{root}/{name}/task'))
            except OSError:
                pass  # it has ended
    return count + 2 * len(sessions)


def _is_gone(path: str) -> bool:
    """Whether a process has ended, of which traces are left."""
    return os.path.exists(path) and state(path) == 'X'


def explain(reasons: Mapping[str, str]) -> str:
    """One line for each backend that cannot be used."""
    return '\n'.join(f'  {name}: {reason}' for name, reason in reasons.items())
