"""An error that all ranks have is told by one of them."""

import socket
import sys
import time
from datetime import timedelta
from typing import Any, NoReturn, cast

import torch.distributed as dist

from internlm_mm.utils.arguments import Arguments
from internlm_mm.utils.launch import Launch, guess_launch
from internlm_mm.utils.signals import ignore_stop_signals


class JobParser(Arguments):
    """Reads the command line of a program that a launcher may start several times."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the arguments, once for the whole job, and leave."""
        tell_once(f'{self.format_usage()}{self.prog}: error: {message}')
        sys.exit(2)


def tell_once(message: str, seconds: float | None = None) -> None:
    """Print the message that a rank ends with to standard error; once, if rank 0 ends with it, too.

    Before there is a process group, ranks are known by what their launcher said.

    Args:
        message: A line.
        seconds: How long the others wait for word of rank 0, and it for them to have read it; by
            default 3, and 10 while some may still be starting.
    """
    joined = dist.is_initialized()
    seconds = seconds or (3.0 if joined else 10.0)
    launch, has_store = (_joined(), True) if joined else guess_launch()
    alone = launch.world_size == 1
    if alone or launch.rank == 0:
        print(message, file=sys.stderr, flush=True)
    if alone:
        return
    if not joined:
        ignore_stop_signals()  # of the launcher, when the first has left: all leave alike
    try:
        store = _open_store() if joined else _meet(launch, has_store, seconds)
        is_told = _is_told_by_the_first(store, launch, message, seconds)
    except (RuntimeError, OSError):  # rank 0 has no error, or is gone, and the store with it
        is_told = False
    if launch.rank != 0 and not is_told:
        print(message, file=sys.stderr, flush=True)


def _joined() -> Launch:
    return Launch(dist.get_rank(), dist.get_world_size())


def _open_store() -> Any:
    # torch has no public way to the store that a launcher has opened, and no stubs for its methods.
    return cast(Any, dist.distributed_c10d._get_default_store()).clone()


def _meet(launch: Launch, has_store: bool, seconds: float) -> Any:
    """A store of the ranks that have no process group yet; kept by rank 0, or by the launcher.

    Raises:
        OSError: If nobody keeps one in time.
    """
    keeps = launch.rank == 0 and not has_store
    address = (launch.master_addr, launch.master_port)
    deadline = time.monotonic() + seconds
    while not keeps:  # torch would write a warning for every attempt
        try:
            socket.create_connection(address, timeout=seconds).close()
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    return dist.TCPStore(
        *address,
        launch.world_size,
        is_master=keeps,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
    )


def _is_told_by_the_first(opened: Any, launch: Launch, message: str, seconds: float) -> bool:
    store = cast(Any, dist.PrefixStore('last_words', opened))
    store.set_timeout(timedelta(seconds=seconds))
    if launch.rank == 0:
        store.set('message', message)
        deadline = time.monotonic() + seconds
        # It may be this process that keeps the store.
        while store.add('heard', 0) < launch.world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        return False
    told = store.get('message').decode()  # waits for it
    store.add('heard', 1)
    return told == message
