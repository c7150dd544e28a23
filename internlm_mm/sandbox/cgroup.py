"""A control group for one session, where this machine lets us make one.

The kernel then counts the memory of all processes together, exactly and at once. Elsewhere the host
looks at it many times a second (usage.py).
"""

import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path

_PREFIX = 'internlm_mm-'


class ControlGroup:
    """A group of processes whose memory and number are limited; version 1 or 2.

    Args:
        parent: The group's parent folder; it has the files of the memory controller.
        memory: Most bytes.
        processes: Most processes and threads.

    Raises:
        OSError: If the group cannot be made or does not take its limits.
    """

    def __init__(self, parent: Path, memory: int, processes: int) -> None:
        _remove_stale(parent)
        self.folder = parent / f'{_PREFIX}{os.getpid()}-{os.urandom(4).hex()}'
        self.folder.mkdir(mode=0o755)
        try:
            if (self.folder / 'memory.max').exists():
                self._events = self.folder / 'memory.events'
                self._write('memory.max', memory)
                self._try('memory.swap.max', 0)
                self._try('memory.oom.group', 1)
                self._try('pids.max', processes)
            elif (self.folder / 'memory.limit_in_bytes').exists():
                self._events = self.folder / 'memory.oom_control'
                self._write('memory.limit_in_bytes', memory)
                self._try('memory.memsw.limit_in_bytes', memory)
            else:
                raise OSError(errno.ENOENT, 'no memory controller', str(self.folder))
        except OSError:
            self.folder.rmdir()
            raise
        self._kills = self.kills()

    def add(self, processes: Sequence[int]) -> None:
        """Put processes in; what they start follows."""
        for process in processes:
            (self.folder / 'cgroup.procs').write_text(str(process))

    def kills(self) -> int:
        """How often the kernel killed a process of the group for want of memory."""
        for line in self._events.read_text().splitlines():
            name, _, count = line.partition(' ')
            if name == 'oom_kill':
                return int(count)
        return 0

    def ran_out(self) -> bool:
        """Whether it has, since this was asked last."""
        before, self._kills = self._kills, self.kills()
        return self._kills > before

    def remove(self) -> None:
        """Remove the group; its processes have ended."""
        for _ in range(50):
            try:
                self.folder.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.002)  # the kernel is still taking the last of them apart

    def _write(self, name: str, value: int) -> None:
        (self.folder / name).write_text(str(value))

    def _try(self, name: str, value: int) -> None:
        """Set what not every kernel has."""
        try:
            self._write(name, value)
        except OSError:
            pass


def find_parent(memberships: str | None = None, root: Path = Path('/sys/fs/cgroup')) -> Path | None:
    """The folder in which groups can be made, None if there is none.

    Args:
        memberships: What `/proc/self/cgroup` says; it is read when None.
        root: Where control groups are mounted.
    """
    if memberships is None:
        try:
            memberships = Path('/proc/self/cgroup').read_text()
        except OSError:
            return None
    candidates: list[Path] = []
    for line in memberships.splitlines():
        _, controllers, path = line.split(':', 2)
        if 'memory' in controllers.split(','):
            own = root / 'memory' / path.strip('/')
            candidates += [own, root / 'memory']
        elif not controllers:
            own = root / path.strip('/')
            # A group that holds processes cannot divide its memory; one above may.
            candidates += [own, *own.parents]
    for parent in candidates:
        if (root in (parent, *parent.parents)) and _can_make(parent):
            return parent
    return None


def _can_make(parent: Path) -> bool:
    if not os.access(parent, os.W_OK):
        return False
    try:
        group = ControlGroup(parent, 1 << 30, 64)
    except OSError:
        return False
    try:
        child = os.posix_spawn('/bin/sleep', ['sleep', '5'], {})
        try:
            group.add([child])
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)
    except OSError:
        return False
    finally:
        group.remove()
    return True


def _remove_stale(parent: Path) -> None:
    """Remove what a host that was killed has left behind."""
    for folder in parent.glob(f'{_PREFIX}*'):
        owner = folder.name.removeprefix(_PREFIX).partition('-')[0]
        if owner.isdigit() and not Path(f'/proc/{owner}').exists():
            try:
                folder.rmdir()
            except OSError:
                pass  # it has processes still
