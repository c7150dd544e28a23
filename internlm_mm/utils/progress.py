"""How far a long conversion is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def byte_bar(title: str, size: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over bytes, on standard error.

    Args:
        title: What is being done.
        size: Bytes in all.
        shown: Whether there is a bar at all.

    Yields:
        To be called with the number of bytes that have been done since the last call.
    """
    with Progress(
        TextColumn('{task.description}'),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
    ) as progress:
        task = progress.add_task(title, total=size)
        yield lambda count: progress.advance(task, count)
