"""Continuing text in a terminal."""

from __future__ import annotations

import sys
from typing import TextIO

from internlm_mm.inference.generator import Generator
from internlm_mm.inference.sampling import Sampling


def complete(
    generator: Generator, prompt: str, sampling: Sampling, out: TextIO | None = None
) -> None:
    """Write a prompt and its continuation, piece by piece as it is generated.

    Args:
        generator: The model.
        prompt: The text to continue.
        sampling: How to draw.
        out: Where to write; standard output if None.
    """
    pieces = generator.stream(prompt, sampling)
    first = next(pieces, '')  # a prompt that cannot be continued fails before it is written
    print(prompt, first, sep='', end='', flush=True, file=out)
    for piece in pieces:
        print(piece, end='', flush=True, file=out)
    print(file=out)


def interact(generator: Generator, sampling: Sampling) -> None:
    """Continue what is typed, line by line, until the input ends."""
    print('The model continues what you type. Ctrl-D leaves, Ctrl-C stops a continuation.')
    while True:
        try:
            prompt = input('> ')
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            complete(generator, prompt, sampling)
        except KeyboardInterrupt:
            print()
        except ValueError as error:
            print(f'error: {error}', file=sys.stderr)
