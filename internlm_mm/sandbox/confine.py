"""Runs outside in the sandbox's Python: starts a worker behind Landlock and minds its processes.

For machines without bubblewrap. The process that this begins as is none of the session's: it adopts
every process that the session leaves behind and kills all when the host hangs up. Its child gives
up its rights for good, by Landlock and a filter of system calls, and becomes the worker.

The host starts a compiled copy of it; only the standard library is there, and as little of it as
can be is imported: hence modules that are built in.
"""

import _frozen_importlib_external
import _signal
import ctypes
import errno
import os
import resource
import struct
import sys

OLDEST = 3
"""The oldest version of Landlock that keeps files from being cut short."""

SCOPES = 6
"""The version from which Landlock keeps signals inside."""

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_NO_NEW_PRIVILEGES, _SECCOMP, _SUBREAPER, _DEATH = 38, 22, 36, 1
_EXECUTE, _WRITE, _READ, _READ_FOLDER = 1, 2, 4, 8
_DEVICES = 1 << 6 | 1 << 11 | 1 << 15  # making character and block devices, calling them
_ALL = {3: (1 << 15) - 1, 4: (1 << 15) - 1}  # from 5 on one more
_FILE = _EXECUTE | _WRITE | _READ | 1 << 14  # what a rule on a file may grant

_libc = ctypes.CDLL(None, use_errno=True)


def call(number: int, *arguments: object) -> int:
    """A system call that libc has no name for."""
    result = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def landlock_version() -> int:
    """Version of Landlock in this kernel, 0 where there is none."""
    try:
        return call(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    except OSError:
        return 0


def restrict(readable: list[str], writable: list[str], version: int) -> None:
    """Give up every file but these, the network and signals to others; for good.

    Args:
        readable: Files and folders that may be read and executed.
        writable: Files and folders in which all may be done.
        version: Of Landlock: what it does not know cannot be given up.
    """
    every = _ALL.get(version, (1 << 16) - 1)
    handled = struct.pack('QQQ', every, 3 if version >= 4 else 0, 3 if version >= SCOPES else 0)
    size = 24 if version >= SCOPES else 16 if version >= 4 else 8
    rules = call(_CREATE, ctypes.c_char_p(handled), ctypes.c_size_t(size), ctypes.c_uint(0))
    for paths, granted in (
        (readable, _EXECUTE | _READ | _READ_FOLDER),
        (writable, every & ~_DEVICES),
    ):
        for path in paths:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rights = granted if os.path.isdir(path) else granted & _FILE
            rule = ctypes.c_char_p(struct.pack('=Qi', rights & every, place))
            call(_ADD, ctypes.c_int(rules), ctypes.c_int(1), rule, ctypes.c_uint(0))
            os.close(place)
    _libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    call(_RESTRICT, ctypes.c_int(rules), ctypes.c_uint(0))
    os.close(rules)


def load_filter(code: bytes) -> None:
    """Hand a filter of system calls to the kernel, for this process and all that it starts."""
    steps = ctypes.create_string_buffer(code)
    program = struct.pack('HxxxxxxQ', len(code) // 8, ctypes.addressof(steps))
    _libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if _libc.prctl(_SECCOMP, 2, ctypes.c_char_p(program), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), 'the kernel refuses the filter of system calls')


def lacks_files(error: OSError) -> bool:
    """Whether it is we who cannot open any file, so that nothing is known of what we look at."""
    return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def descendants(process: int) -> list[int]:
    """All processes below one.

    Raises:
        OSError: If the caller can open no files.
    """
    found, below = [], [process]
    while below:
        parent = below.pop()
        try:
            for task in os.listdir(f'/proc/{parent}/task'):
                with open(f'/proc/{parent}/task/{task}/children') as file:
                    below += map(int, file.read().split())
        except OSError as error:
            if lacks_files(error):
                raise  # else it has ended
        found.append(parent)
    return found[1:]


def mind(lifeline: int) -> None:
    """Wait until the host says so, hangs up or is gone, then kill all that is left."""
    # A copy of the host may hold the lifeline, too, and lives on when the host is killed.
    _signal.signal(_signal.SIGHUP, lambda number, frame: end_all())  # noqa: ARG005
    _libc.prctl(_DEATH, int(_signal.SIGHUP), 0, 0, 0)
    try:
        os.read(lifeline, 1)
    except OSError:
        pass
    end_all()


def end_all() -> None:
    """Kill all processes below us, and end."""
    while True:
        try:  # whoever is left is a child of ours, or below one: lists of children may miss some
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            os._exit(0)
        left = descendants(os.getpid())
        for number in (_signal.SIGSTOP, _signal.SIGKILL):  # none starts another while it waits
            for process in left:
                try:
                    os.kill(process, number)
                except OSError:
                    pass


def run_worker(arguments: list[str], paths: list[str], version: int, code: bytes) -> None:
    """Become the worker.

    Args:
        arguments: Its file and its own arguments.
        paths: Of `restrict`: what may be written, the session's folder first; an empty one; what
            may be read.
        version: Of Landlock; 0 leaves it out.
        code: The filter of system calls; none leaves it out.
    """
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
    _libc.prctl(_DEATH, int(_signal.SIGKILL), 0, 0, 0)  # nobody minds us any more
    os.chdir(paths[0])
    if version:
        middle = paths.index('')
        restrict(paths[middle + 1 :], paths[:middle], version)
    if resource.getrlimit(resource.RLIMIT_CORE)[1]:
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))  # less than a byte calls a handler outside
    if code:
        load_filter(code)
    sys.argv = arguments
    loader = _frozen_importlib_external.SourcelessFileLoader('__main__', arguments[0])
    program = loader.get_code('__main__')
    assert program is not None
    exec(program, {'__name__': '__main__'})


def main(arguments: list[str]) -> None:
    """Start the worker and mind it.

    Args:
        arguments: Numbers of the lifeline, of the control channel and of the file with the filter
            (-1: none), the version of Landlock (0: none), paths, '--', and the worker's.
    """
    lifeline, control, filter_file, version = map(int, arguments[:4])
    end = arguments.index('--')
    code = b''
    if filter_file >= 0:
        code = os.pread(filter_file, 1 << 20, 0)
        os.close(filter_file)
    _libc.prctl(_SUBREAPER, 1, 0, 0, 0)
    _signal.signal(_signal.SIGINT, _signal.SIG_IGN)
    _signal.signal(_signal.SIGCHLD, _signal.SIG_IGN)  # the dead are not kept
    worker = arguments[end + 1 :]
    if os.fork() == 0:
        os.close(lifeline)
        run_worker(worker, arguments[4:end], version, code)
        os._exit(0)
    os.close(control)
    for output in (1, 2):
        os.close(output)
    mind(lifeline)


if __name__ == '__main__':
    main(sys.argv[1:])
