"""What torch's compiler, inductor, can be told, and what it finds out by itself."""

import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch._inductor import cpu_vec_isa

_LATE_IMPORTS = ('torch._inductor.codecache', 'torch.utils._filelock')
"""What `cpu_vec_isa` imports when it looks."""


def known_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that this torch's inductor has.

    Args:
        options: By their dotted names in `torch._inductor.config`.
    """
    # An attribute that torch imports when it is asked for.
    return {name: options[name] for name in options if _has(torch._inductor.config, name)}


def _has(config: Any, name: str) -> bool:
    for part in name.split('.'):
        if not hasattr(config, part):
            return False
        config = getattr(config, part)
    return True


@cache
def look_for_vectors() -> threading.Thread:
    """Have inductor find out meanwhile what vectors this processor and its C++ compiler know.

    It tries every kind in a process of its own, which imports torch, and keeps what it found for as
    long as this process runs: 5 to 50 s, most of it waiting, in which weights can be loaded and a
    first forward and backward run.

    Returns:
        To be joined before a kernel for the CPU is compiled; the same one whoever asks.
    """

    def look() -> None:
        with suppress(Exception):  # it will be raised again, where a kernel is compiled
            cpu_vec_isa.valid_vec_isa_list()

    for name in _LATE_IMPORTS:  # not in the thread, where they could meet half of another import
        import_module(name)
    thread = threading.Thread(target=look, name='vectors', daemon=True)
    thread.start()
    return thread
