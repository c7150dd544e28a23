"""An error that all ranks have is told by one of them."""

import sys
import time
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist


def tell_once(message: str, seconds: float = 3.0) -> None:
    """Print the message that a rank ends with to standard error; once, if rank 0 ends with it, too.

    Args:
        message: A line.
        seconds: How long the others wait for word of rank 0, and it for them to have read it.
    """
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    if alone or dist.get_rank() == 0:
        print(message, file=sys.stderr, flush=True)
    if alone:
        return
    try:
        is_told = _is_told_by_the_first(message, seconds)
    except RuntimeError:  # rank 0 has no error, or is gone, and the store with it
        is_told = False
    if dist.get_rank() != 0 and not is_told:
        print(message, file=sys.stderr, flush=True)


def _is_told_by_the_first(message: str, seconds: float) -> bool:
    # torch has no public way to the store that a launcher has opened, and no stubs for its methods.
    opened = cast(Any, dist.distributed_c10d._get_default_store())
    store = cast(Any, dist.PrefixStore('last_words', opened.clone()))
    store.set_timeout(timedelta(seconds=seconds))
    if dist.get_rank() == 0:
        store.set('message', message)
        deadline = time.monotonic() + seconds
        # It may be this process that keeps the store.
        while store.add('heard', 0) < dist.get_world_size() - 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        return False
    told = store.get('message').decode()  # waits for it
    store.add('heard', 1)
    return told == message
