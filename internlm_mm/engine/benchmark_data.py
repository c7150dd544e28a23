"""The data path and checkpoints on this machine's processor and disk, each against its target."""

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from internlm_mm.checkpoint.checkpointer import Checkpointer
from internlm_mm.datasets.speed import (
    in_turns,
    make_sparse_files,
    measure_loading,
    measure_opening,
    measure_tokenisation,
)
from internlm_mm.utils.host_memory import available_memory


class Target(NamedTuple):
    """What a figure should be.

    Attributes:
        part: Part of the report.
        key: Of the figure in it.
        bound: It.
        at_least: Whether the figure should be at least that, or at most.
        text: What it is, with a place for the figure.
        scale: Factor of the figure as it is shown.
    """

    part: str
    key: str
    bound: float
    at_least: bool
    text: str
    scale: float = 1.0


TARGETS = (
    Target('tokenisation', 'speed', 0.9, True, 'tokenisation, {:.1%} of raw SentencePiece a core'),
    Target('opening', 'open_seconds', 2.0, False, 'opening, {:.2f} s'),
    Target('opening', 'opened_bytes', 300e6, False, 'resident when open, {:.0f} MB', 1e-6),
    Target('opening', 'row_milliseconds', 10.0, False, 'first row of step 1,000,000, {:.2f} ms'),
    Target('loading', 'tokens_per_second', 1e5, True, 'loader, {:,.0f} tokens/s a core'),
    Target('saving', 'speed', 0.8, True, 'checkpoint save, {:.1%} of raw writing'),
)


PARTS = ('tokens', 'opening', 'saving')
"""What can be measured by itself: tokenising and loading, a large corpus, checkpoints."""


SEQ_LEN = 4096
"""Tokens of a row that is read."""

DOCUMENT_LENGTH = 1000
"""Tokens of every document of the corpus that is opened."""


def check_room(folder: Path, megabytes: int) -> None:
    """Refuse a checkpoint that memory or the disk has no room for, before it is made.

    Args:
        folder: On the disk to measure.
        megabytes: Of tensors, in 10^6 bytes.

    Raises:
        ValueError: Naming the option.
    """
    rooms = (
        ('memory', available_memory()),
        (f'the disk of {folder}', shutil.disk_usage(folder).free),
    )
    for what, room in rooms:
        if room is not None and megabytes * 1_000_000 > room:
            raise ValueError(
                f'--megabytes {megabytes}: more than {what} has left, {room // 1_000_000}'
            )


def measure_saving(folder: Path, megabytes: int, turns: int) -> dict[str, Any]:
    """A whole checkpoint, manifest and checksums included, against its bytes and an fsync.

    Args:
        folder: On the disk to measure.
        megabytes: Of tensors, in 10^6 bytes.
        turns: Times of each, after one that does not count.

    Returns:
        As `in_turns`, by the clock, and `megabytes`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = 16
    width = megabytes * 1_000_000 // 4 // count
    tensors = {f'model.{index}': torch.randn(width) for index in range(count)}
    checkpointer = Checkpointer(async_save=False)

    def ours() -> None:
        checkpointer.save(folder / 'iter_1', tensors, {'iter': 1})

    def other() -> None:
        with open(folder / 'raw', 'wb') as file:
            for tensor in tensors.values():
                file.write(tensor.numpy().data)
            file.flush()
            os.fsync(file.fileno())

    def afresh(write: Any) -> Any:
        def run() -> float:
            shutil.rmtree(folder / 'iter_1', ignore_errors=True)
            (folder / 'raw').unlink(missing_ok=True)
            start = time.perf_counter()
            write()
            return time.perf_counter() - start

        return run

    # Once of each beforehand: the first finds files of that size, and memory for them, nowhere.
    afresh(other)()
    afresh(ours)()
    clocked = _OwnClock()
    found = in_turns(clocked(afresh(ours)), clocked(afresh(other)), turns, clocked.read)
    shutil.rmtree(folder)
    return found | {'megabytes': megabytes}


class _OwnClock:
    """Counts only what functions say that they took: clearing up between turns is no saving."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self, timed: Any) -> Any:
        def run() -> None:
            self._now += timed()

        return run

    def read(self) -> float:
        return self._now


def measure_data(
    text_files: Sequence[Path],
    tokenizer: Path,
    folder: Path,
    *,
    turns: int,
    files: int,
    tokens_per_file: int,
    megabytes: int,
    seconds: float,
    parts: Sequence[str] = PARTS,
) -> dict[str, Any]:
    """Everything, in a folder that may be removed afterwards.

    Args:
        text_files: To tokenise.
        tokenizer: A SentencePiece model or its folder.
        folder: On the disk to measure.
        turns: Of every comparison.
        files: Of the corpus that is opened.
        tokens_per_file: In each of them.
        megabytes: Of the checkpoint.
        seconds: Of loading.
        parts: Of `PARTS`.

    Returns:
        JSON-ready; of what was asked for, `tokenisation`, `opening`, `loading`, `loading_sparse`
        (rows of all the files that were opened) and `saving`.
    """
    report: dict[str, Any] = {}
    if 'tokens' in parts:
        report['tokenisation'] = measure_tokenisation(text_files, tokenizer, folder, turns)
        report['loading'] = measure_loading(folder / 'tokens' / 'train', SEQ_LEN, seconds)
    if 'opening' in parts:
        sparse = folder / 'sparse' / 'all'
        make_sparse_files(sparse, files, tokens_per_file, DOCUMENT_LENGTH)
        report['opening'] = measure_opening(sparse.parent, SEQ_LEN, 1_000_000, 512)
        report['loading_sparse'] = measure_loading(sparse.parent, SEQ_LEN, seconds)
        shutil.rmtree(sparse)
    if 'saving' in parts:
        report['saving'] = measure_saving(folder / 'saving', megabytes, turns)
    return report


def judge(report: Mapping[str, Any]) -> list[tuple[Target, float, bool]]:
    """Every target of what was measured, with its figure, and whether it is met."""
    found = []
    for target in (target for target in TARGETS if target.part in report):
        value = report[target.part][target.key]
        met = value >= target.bound if target.at_least else value <= target.bound
        found.append((target, value, met))
    return found


def render_data(report: Mapping[str, Any]) -> str:
    """The report as lines for a person."""
    lines = []
    for target, value, met in judge(report):
        bound = target.text.format(target.bound * target.scale).rpartition(', ')[2]
        word = 'at least' if target.at_least else 'at most'
        lines.append(
            f'{"met   " if met else "MISSED"}  {target.text.format(value * target.scale)} '
            f'(target: {word} {bound})'
        )
    if 'opening' in report:
        opening, rows = report['opening'], report['loading_sparse']['tokens_per_second']
        lines += [
            f'        {opening["tokens"]:,} tokens opened in {opening["open_cpu_seconds"]:.2f} s '
            'of a core',
            f'        {opening["read_bytes"] / 1e6:,.0f} MB resident after 1,000 rows, mapped '
            f'pages and {opening["imported_bytes"] / 1e6:,.0f} MB of imports among them',
            f'        {rows:,.0f} tokens/s a core from rows of all these files',
        ]
    if 'saving' in report:
        saving = report['saving']
        lines.append(
            f'        checkpoint save, the best of each: {saving["best_speed"]:.1%}; '
            f'{saving["megabytes"] / saving["other_seconds"]:,.0f} MB/s raw'
        )
    return '\n'.join(lines)
