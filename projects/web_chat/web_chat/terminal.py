"""The same events without a browser."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TextIO

from web_chat.events import Code, Event, Result, Text, check_png


def write_events(events: Iterable[Event], out: TextIO) -> None:
    """Write an answer as it comes; images as their sizes.

    Args:
        events: Of a backend.
        out: Where to write.
    """
    for event in events:
        match event:
            case Text(text):
                print(text, end='', flush=True, file=out)
            case Code(source):
                print(f'\n```python\n{source}\n```', flush=True, file=out)
            case Result(text, images):
                print(text, *map(describe, images), sep='\n', flush=True, file=out)
    print(file=out)


def describe(image: bytes) -> str:
    """What a terminal shows of an image."""
    try:
        width, height = check_png(image)
    except ValueError as error:
        return f'[{error}]'
    return f'[image, {width} x {height}]'
