"""How much a session uses: looked at from outside, by the kernel's own counts."""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from internlm_mm.sandbox.confine import lacks_files
from internlm_mm.sandbox.limits import MIB, Limits

_TICKS = os.sysconf('SC_CLK_TCK')
_PAGE = os.sysconf('SC_PAGE_SIZE')
_DEEPEST = 64
_MOST_OF_TABLE = 1 << 20  # bytes that are read: some 18,000 locks or sockets
_MOST_OF_MAPS = 16 << 20  # bytes of the lists of mappings of all processes together
_FREE_SOCKETS = 16  # what honest programs have


@dataclass(frozen=True, slots=True)
class Disk:
    """What is in a folder: bytes and the number of files and folders."""

    size: int
    files: int


def cpu_seconds(processes: Sequence[int]) -> float:
    """Processor time of processes and of those of their children that they have buried."""
    ticks = 0
    for process in processes:
        try:
            with open(f'/proc/{process}/stat', 'rb') as file:
                fields = file.read().rpartition(b') ')[2].split()
            ticks += sum(map(int, fields[11:15]))
        except (OSError, ValueError):
            pass  # it has ended
    return ticks / _TICKS


def run_seconds(processes: Sequence[int]) -> float:
    """Processor time of processes, to the microsecond; not of their children."""
    total = 0
    for process in processes:
        try:
            for task in os.listdir(f'/proc/{process}/task'):
                with open(f'/proc/{process}/task/{task}/schedstat', 'rb') as file:
                    total += int(file.read().split()[0])
        except OSError:
            pass  # it has ended
    return total / 1e9


def memory_bytes(processes: Sequence[int], enough: int) -> int:
    """Memory of processes; what they share is counted once if the plain sum is over `enough`.

    What is swapped out, which a process can ask for, counts as soon as all that they have mapped
    is more than `enough`.
    """
    owners = [_living(process) for process in processes]
    sizes = [_sizes(owner) for owner in owners]
    plain = sum(resident for _, resident in sizes)
    if sum(mapped for mapped, _ in sizes) <= enough:
        return plain
    plain += sum(_field(f'{owner}/status', b'VmSwap:') or 0 for owner in owners)
    if plain <= enough:
        return plain
    return sum(map(_share, owners))


def lock_count(processes: Sequence[int]) -> int:
    """Locks on parts of files that processes have: memory of the kernel's that nobody counts."""
    table = _read_table('/proc/locks')  # empty: a kernel without locks
    owners = {str(process).encode() for process in processes}
    found = (line.split(None, 5) for line in table.splitlines() if b' -> ' not in line)
    return sum(len(fields) > 5 and fields[4] in owners for fields in found)


def socket_bytes(processes: Sequence[int], network: int | None) -> int:
    """What the kernel may hold for the sockets of processes, which their own memory leaves out.

    Args:
        processes: Of the session.
        network: A process of theirs if they have a network of their own: all sockets in it count,
            those that wait to be accepted or are on their way, too. Else those that they hold.
    """
    if network is not None:
        count = _read_table(f'{_living(network)}/net/unix').count(b'\n') - 1
    else:
        count = len(set().union(*map(_sockets, processes)))
    return max(0, count - _FREE_SOCKETS) * _socket_size()


def file_system(folder: int) -> Disk:
    """What is in a file system of its own, of which a folder is open."""
    info = os.fstatvfs(folder)
    used = info.f_files - info.f_ffree if info.f_files else 0
    return Disk((info.f_blocks - info.f_bfree) * info.f_frsize, used)


def folder_tree(folder: int, processes: Sequence[int], limits: Limits) -> Disk:
    """What is in a folder of the host's, and in files deleted there that are still in use.

    The folder may change under our eyes, so that no link is followed and no path is believed.
    A process that hides its files, also among a hundred thousand others in its memory, counts as
    too much, a deleted one that is only mapped as one of the largest size: only root is told its
    own.

    Args:
        folder: The folder, open.
        processes: Of the session.
        limits: Nobody counts further than they reach.
    """
    size, files = _walk(folder, limits.files + 1, limits.disk_mb * MIB, 0)
    here = os.fsencode(os.readlink(f'/proc/self/fd/{folder}')).replace(b'\n', rb'\012')
    deleted: dict[int, int] = {}
    room = _MOST_OF_MAPS
    for process in processes:
        owner = _living(process)
        try:
            deleted |= _open_and_deleted(owner)
            maps = _maps(owner, room + 1)
            room -= len(maps)
            if room < 0:  # to read more would take longer than a look may
                files += limits.files + 1
                break
            for number in _mapped_and_deleted(maps, here):
                deleted.setdefault(number, limits.file_mb * MIB)
        except PermissionError:  # it has just ended, or runs a program that nobody may read
            if _has_memory(owner):
                files += limits.files + 1
    return Disk(size + sum(deleted.values()), files + len(deleted))


def over_limit(disk: Disk, limits: Limits) -> str | None:
    """The limit of files that is passed, by name."""
    if disk.files > limits.files:
        return 'files'
    return 'disk_mb' if disk.size > limits.disk_mb * MIB else None


def remove_tree(path: Path) -> None:
    """Remove a folder that a session wrote to: of any depth, closed to us or not.

    Nobody writes to it any more. No link is followed, and no path is longer than a name.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    here = os.open(path, flags)
    way: list[str] = []
    try:
        left = [_remove_files(here)]
        while way or left[-1]:
            if left[-1]:
                way.append(left[-1].pop())
                below = _open_folder(way[-1], flags, here)
                left.append(_remove_files(below))
            else:
                left.pop()
                below = os.open('..', flags, dir_fd=here)
                os.rmdir(way.pop(), dir_fd=below)
            os.close(here)
            here = below
    finally:
        os.close(here)
    os.rmdir(path)


def _open_folder(name: str, flags: int, above: int) -> int:
    """Open a folder and take the right to remove what is in it; root has both."""
    try:
        folder = os.open(name, flags, dir_fd=above)
    except PermissionError:
        os.chmod(name, 0o700, dir_fd=above)
        return os.open(name, flags, dir_fd=above)
    if os.getuid() != 0:
        os.fchmod(folder, 0o700)
    return folder


def _remove_files(folder: int) -> list[str]:
    """Remove all but the folders in a folder; their names."""
    folders = []
    for name in os.listdir(folder):
        if _is_folder(name, folder):
            folders.append(name)
        else:
            os.unlink(name, dir_fd=folder)
    return folders


def _is_folder(name: str, folder: int) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)


def _walk(folder: int, most_files: int, most_bytes: int, depth: int) -> tuple[int, int]:
    if depth > _DEEPEST:
        return 0, most_files  # no program of a chat has such a tree
    size, files = 0, 0
    try:
        handle = os.open('.', os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        if lacks_files(error):
            raise
        return 0, most_files  # closed to us: counted as too much
    try:
        for name in os.listdir(handle):
            try:
                info = os.stat(name, dir_fd=handle, follow_symlinks=False)
                files += 1
                size += info.st_blocks * 512
                if stat.S_ISDIR(info.st_mode):
                    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                    inner = os.open(name, flags, dir_fd=handle)
                    try:
                        more = _walk(inner, most_files - files, most_bytes - size, depth + 1)
                    finally:
                        os.close(inner)
                    size, files = size + more[0], files + more[1]
            except FileNotFoundError:
                continue
            if files >= most_files or size > most_bytes:
                break
    finally:
        os.close(handle)
    return size, files


def _living(process: int) -> str:
    """Folder of what is known of a process: of another thread where the first has ended."""
    whole = f'/proc/{process}'
    if _has_memory(whole):
        return whole
    try:
        tasks = [f'{whole}/task/{task}' for task in os.listdir(f'{whole}/task')]
    except OSError:
        return whole
    return next((task for task in tasks if _has_memory(task)), whole)


def _has_memory(owner: str) -> bool:
    """Whether a process or thread has not ended."""
    try:
        with open(f'{owner}/statm', 'rb') as file:
            return not file.read().startswith(b'0 ')
    except OSError:
        return False


def _open_and_deleted(owner: str) -> dict[int, int]:
    """Size of each deleted file that a process holds open, by its number."""
    found = {}
    try:
        names = os.listdir(f'{owner}/fd')
    except (FileNotFoundError, ProcessLookupError):
        return {}  # it has ended
    for name in names:
        try:
            info = os.stat(f'{owner}/fd/{name}')
        except (FileNotFoundError, ProcessLookupError):
            continue  # it was closed
        if stat.S_ISREG(info.st_mode) and not info.st_nlink:
            found[info.st_ino] = info.st_blocks * 512
    return found


def _maps(owner: str, most: int) -> bytes:
    """The beginning of the list of what is in a process's memory."""
    try:
        with open(f'{owner}/maps', 'rb') as file:
            return file.read(most)
    except (FileNotFoundError, ProcessLookupError):
        return b''


def _mapped_and_deleted(data: bytes, folder: bytes) -> set[int]:
    """Numbers of deleted files of a folder that are in such a list."""
    if b' (deleted)\n' not in data:
        return set()
    ends = [line for line in data.splitlines() if line.endswith(b' (deleted)')]
    return {int(line.split(None, 5)[4]) for line in ends if b' ' + folder + b'/' in line}


def _sockets(process: int) -> set[str]:
    """Numbers of the sockets that a process holds."""
    folder = f'{_living(process)}/fd'
    found = set()
    try:
        for name in os.listdir(folder):
            try:
                link = os.readlink(f'{folder}/{name}')
            except FileNotFoundError:
                continue  # it was closed
            if link.startswith('socket:'):
                found.add(link)
    except OSError as error:
        if lacks_files(error):
            raise  # else it has ended, or hides: whoever counts files sees to that
    return found


@cache
def _socket_size() -> int:
    """Most that one socket holds: the last message that it takes may be half of all."""
    try:
        return int(Path('/proc/sys/net/core/wmem_default').read_text()) * 3 // 2
    except (OSError, ValueError):
        return 212_992 * 3 // 2


def _read_table(path: str) -> bytes:
    """The beginning of one of the kernel's tables; nothing if there is none."""
    table = b''
    try:
        with open(path, 'rb', buffering=0) as file:
            while len(table) < _MOST_OF_TABLE and (piece := file.read(1 << 16)):
                table += piece
    except OSError as error:
        if lacks_files(error):
            raise
    return table


def _sizes(owner: str) -> tuple[int, int]:
    """Memory that a process has mapped, and how much of it is there."""
    try:
        with open(f'{owner}/statm', 'rb') as file:
            mapped, resident = file.read().split()[:2]
    except (OSError, ValueError):
        return 0, 0
    return int(mapped) * _PAGE, int(resident) * _PAGE


def _share(owner: str) -> int:
    """Its memory, with what it shares divided among all that share it."""
    there = _field(f'{owner}/smaps_rollup', b'Pss:')
    if there is None:
        return _sizes(owner)[1] + (_field(f'{owner}/status', b'VmSwap:') or 0)
    return there + (_field(f'{owner}/smaps_rollup', b'SwapPss:') or 0)


def _field(path: str, name: bytes) -> int | None:
    """Bytes of a line of a table in KiB; None if there is none."""
    try:
        with open(path, 'rb') as file:
            for line in file:
                if line.startswith(name):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
