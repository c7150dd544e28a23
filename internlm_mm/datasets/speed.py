"""How fast data is made, opened and read, measured against what is underneath."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from internlm_mm.datasets.documents import read_documents
from internlm_mm.datasets.loader import TokenLoader
from internlm_mm.datasets.preprocessing import preprocess
from internlm_mm.datasets.pretrain import PretrainDataset
from internlm_mm.datasets.token_writer import TokenFileWriter

Clock = Callable[[], float]

# What `measure_opening` runs in a process of its own, which holds nothing else.
_OPEN = """
import json, sys
from internlm_mm.datasets.speed import open_and_read
print(json.dumps(open_and_read(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
"""


def in_turns(
    ours: Callable[[], Any], other: Callable[[], Any], turns: int, clock: Clock = time.perf_counter
) -> dict[str, Any]:
    """Time two functions in turns, each as often first, so that both meet the same weather.

    Args:
        ours: What is measured.
        other: What it is compared with.
        turns: Times of each.
        clock: `time.process_time` does not count what other programs take.

    Returns:
        `seconds` and `other_seconds`, medians; `speed`, the median over turns of other / ours: 1.0
        is as fast, 0.5 half as fast; `speeds` of all turns; `best_speed`, of the best of each,
        which others on the machine disturb least.
    """
    took: dict[str, list[float]] = {'ours': [], 'other': []}
    for turn in range(turns):
        pair = [('ours', ours), ('other', other)]
        for name, function in pair if turn % 2 == 0 else reversed(pair):
            start = clock()
            function()
            took[name].append(clock() - start)
    speeds = [b / a for a, b in zip(took['ours'], took['other'], strict=True)]
    return {
        'seconds': statistics.median(took['ours']),
        'other_seconds': statistics.median(took['other']),
        'speed': statistics.median(speeds),
        'best_speed': min(took['other']) / min(took['ours']),
        'speeds': speeds,
    }


def measure_tokenisation(
    text_files: Sequence[Path], tokenizer: Path, folder: Path, turns: int
) -> dict[str, Any]:
    """Text to token file in one process, against SentencePiece alone over texts in memory.

    Args:
        text_files: What `preprocess` reads.
        tokenizer: A folder with `tokenizer.model`, or the file.
        folder: For the token files.
        turns: Times of each.

    Returns:
        As `in_turns`, in seconds of the processor; `tokens` and `tokens_per_second` of a core.
    """
    from sentencepiece import SentencePieceProcessor

    model = tokenizer / 'tokenizer.model' if tokenizer.is_dir() else tokenizer
    raw = SentencePieceProcessor(model_file=str(model))
    texts = [document.text for file in text_files for document in read_documents(file)]

    def ours() -> None:
        preprocess(
            text_files,
            folder / 'tokens',
            tokenizer=tokenizer,
            num_workers=0,
            overwrite=True,
            show_progress=False,
        )

    def other() -> None:
        for text in texts:
            raw.encode(text)

    found = in_turns(ours, other, turns, time.process_time)
    tokens = sum(len(raw.encode(text)) for text in texts)
    return found | {'tokens': tokens, 'tokens_per_second': tokens / found['seconds']}


def measure_loading(data_root: Path, seq_len: int, seconds: float) -> dict[str, float]:
    """Tokens that one core cuts into batches, in the process itself, in shuffled order.

    Args:
        data_root: What `PretrainDataset` reads.
        seq_len: Length of a row, in tokens.
        seconds: Of the processor, to measure.

    Returns:
        `tokens_per_second` of the processor's time, and by the clock `wall_tokens_per_second`.
    """
    dataset = PretrainDataset(data_root, seq_len=seq_len)
    loader = TokenLoader(dataset, global_batch_size=8, micro_batch_size=1)
    steps = iter(loader)
    next(steps)
    tokens = 0
    start, begun = time.process_time(), time.perf_counter()
    while time.process_time() - start < seconds:
        tokens += sum(batch.num_tokens for batch in next(steps))
    spent, passed = time.process_time() - start, time.perf_counter() - begun
    return {'tokens_per_second': tokens / spent, 'wall_tokens_per_second': tokens / passed}


def make_sparse_files(root: Path, files: int, tokens: int, document_length: int = 1000) -> None:
    """Token files that take no room: holes for tokens, one index of documents for all of them.

    Args:
        root: One folder a file is made here.
        files: How many.
        tokens: Of each; a multiple of `document_length`.
        document_length: Tokens of every document.
    """
    first = root / f'{0:05}'
    lengths = np.full(tokens // document_length, document_length)
    # A writer decides what belongs into a token file; its tokens are cut off and left as a hole.
    with TokenFileWriter(first, vocab_size=2**16) as writer:
        for part in np.array_split(lengths, max(1, tokens >> 24)):
            writer.add_many(np.zeros(part.sum(), np.int64), part)
    meta = (first / 'meta.json').read_text(encoding='utf-8')
    for index in range(files):
        folder = root / f'{index:05}'
        folder.mkdir(exist_ok=True)
        with open(folder / 'tokens.bin', 'wb') as file:
            file.truncate(tokens * 2)
        if index:
            os.link(first / 'offsets.npy', folder / 'offsets.npy')
            (folder / 'meta.json').write_text(meta, encoding='utf-8')


def measure_opening(root: Path, seq_len: int, step: int, batch_size: int) -> dict[str, float]:
    """What `open_and_read` finds in a fresh process."""
    arguments = [str(root), str(seq_len), str(step), str(batch_size)]
    command = [sys.executable, '-c', _OPEN, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f'the process that opens {root} failed:\n{run.stderr}')
    return json.loads(run.stdout.splitlines()[-1])


def open_and_read(root: str, seq_len: int, step: int, batch_size: int) -> dict[str, float]:
    """Open a corpus and read rows of it, in a process that has done nothing else.

    Args:
        root: What `PretrainDataset` reads.
        seq_len: Length of a row, in tokens.
        step: Whose first row is read.
        batch_size: Rows of a step.

    Returns:
        `tokens`; `open_seconds` and `open_cpu_seconds`; `row_milliseconds`, of the first row of the
        step, which maps its file; `rows_per_cpu_second` of 1,000 more rows in shuffled order;
        `imported_bytes`, `opened_bytes` and `read_bytes`, resident after each, and their maximum.
    """
    imported = _resident('VmRSS')
    start, begun = time.perf_counter(), time.process_time()
    dataset = PretrainDataset(root, seq_len=seq_len)
    found: dict[str, float] = {
        'tokens': dataset.num_tokens,
        'open_seconds': time.perf_counter() - start,
        'open_cpu_seconds': time.process_time() - begun,
        'imported_bytes': imported,
        'opened_bytes': _resident('VmRSS'),
    }
    start = time.perf_counter()
    _ = dataset[step * batch_size]
    found['row_milliseconds'] = (time.perf_counter() - start) * 1e3
    begun = time.process_time()
    rows = 1000
    for index in islice(range(step * batch_size + 1, sys.maxsize), rows):
        _ = dataset[index]
    found['rows_per_cpu_second'] = rows / max(time.process_time() - begun, 1e-9)
    found['read_bytes'] = _resident('VmRSS')
    found['most_bytes'] = _resident('VmHWM')
    return found


def _resident(key: str) -> int:
    """Bytes of this process in memory: 'VmRSS' now, 'VmHWM' at most."""
    status = Path('/proc/self/status').read_text(encoding='utf-8')
    (line,) = (line for line in status.splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
