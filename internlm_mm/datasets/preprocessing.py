"""Text files -> token files, by many processes, with the same bytes out however many there are."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain, groupby
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from internlm_mm.datasets.documents import find_domains, fraction_of, read_documents
from internlm_mm.datasets.token_writer import TokenFileWriter
from internlm_mm.tokenizers import Tokenizer, load_tokenizer
from internlm_mm.utils.publish import publish

SUMMARY_NAME = 'preprocessing.json'
SPLITS = ('train', 'validation')
_BATCH_CHARACTERS = 1 << 20  # what a process gets at a time


@dataclass(slots=True)
class Counts:
    """What became of one domain's documents."""

    documents: int = 0
    tokens: int = 0
    dropped: int = 0  # shorter than min_document_length


class _Batch(NamedTuple):
    split: str | None  # None: by the documents' hash
    domain: str
    texts: list[str]
    file_bytes: int  # progress


class _Tokens(NamedTuple):
    ids: np.ndarray  # [tokens], uint32
    lengths: np.ndarray  # [documents], int64
    dropped: int


@dataclass(frozen=True)
class _Encoder:
    """What a process does with a batch; small, since it travels with every one."""

    tokenizer_path: str
    tokenizer_hash: str
    add_bos: bool
    min_document_length: int
    validation_fraction: float

    def __call__(self, batch: _Batch) -> dict[str, _Tokens]:
        tokenizer = _load_once(self.tokenizer_path, self.tokenizer_hash)
        found: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        for text in batch.texts:
            split = batch.split
            if split is None:
                held_out = fraction_of(text, 'validation') < self.validation_fraction
                split = 'validation' if held_out else 'train'
            found[split].append(self._encode(tokenizer, text))
        return {split: self._join(documents) for split, documents in found.items() if documents}

    def _encode(self, tokenizer: Tokenizer, text: str) -> np.ndarray:
        ids = tokenizer.encode(text)
        if self.add_bos:
            assert tokenizer.bos_id is not None
            ids.insert(0, tokenizer.bos_id)
        assert tokenizer.eos_id is not None
        ids.append(tokenizer.eos_id)
        return np.array(ids, np.uint32)

    def _join(self, documents: list[np.ndarray]) -> _Tokens:
        kept = [ids for ids in documents if len(ids) >= self.min_document_length]
        ids = np.concatenate(kept) if kept else np.empty(0, np.uint32)
        lengths = np.array([len(ids) for ids in kept], np.int64)
        return _Tokens(ids, lengths, len(documents) - len(kept))


@cache
def _load_once(path: str, hash: str) -> Tokenizer:  # noqa: ARG001  # hash: a new file, a new entry
    return load_tokenizer(path)


def preprocess(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str | Path,
    validation_inputs: Sequence[str | Path] = (),
    validation_fraction: float = 0.0,
    text_key: str = 'text',
    add_bos: bool = True,
    min_document_length: int = 1,
    num_workers: int | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> dict[str, dict[str, Counts]]:
    """Tokenise documents into `OUTPUT/train/DOMAIN/` and `OUTPUT/validation/DOMAIN/`.

    Every document ends with the tokenizer's end token. Documents keep the order of the files, by
    name. The output appears when it is whole; an older one stays as it is until then.

    Args:
        inputs: Files and folders. In a folder each sub-folder is a domain, and each file directly
            in it another. `NAME=PATH` puts everything below PATH into domain NAME.
        output: The folder to make.
        tokenizer: What `load_tokenizer` reads.
        validation_inputs: Like `inputs`, for the validation split.
        validation_fraction: Share of the documents held out for validation, chosen by a hash of
            their text, so that copies of a document are on the same side.
        text_key: Where a JSON record or a parquet row has its text.
        add_bos: Begin every document with the tokenizer's begin token.
        min_document_length: Documents of fewer tokens, begin and end included, are left out.
        num_workers: Processes that tokenise; 0 tokenises in this one; None takes every core.
        overwrite: Replace an output that an earlier run of this function made.
        show_progress: Show a progress bar on stderr.

    Returns:
        Counts by split and domain.

    Raises:
        FileNotFoundError: If an input or the tokenizer is missing or has no readable file.
        FileExistsError: If `output` exists and must not be replaced.
        ValueError: If an option or a document is wrong; for documents with file and line.
    """
    output = Path(output)
    check_output(output, overwrite)
    if not 0 <= validation_fraction < 1:
        raise ValueError(f'validation_fraction must be in [0, 1), got {validation_fraction}')
    if validation_fraction and validation_inputs:
        raise ValueError('give validation_inputs or validation_fraction, not both')
    loaded = load_tokenizer(tokenizer)
    for name, needed in (('eos', True), ('bos', add_bos)):
        if needed and getattr(loaded, f'{name}_id') is None:
            hint = '; --no-bos leaves it out' if name == 'bos' else ''
            raise ValueError(f'tokenizer {tokenizer} has no {name} token to put at documents{hint}')
    train_files = domains_of(inputs)
    validation_files = domains_of(validation_inputs)
    encoder = _Encoder(
        str(tokenizer), loaded.hash, add_bos, min_document_length, validation_fraction
    )
    batches = _batches(
        [
            *((None if validation_fraction else 'train', *item) for item in train_files.items()),
            *(('validation', *item) for item in validation_files.items()),
        ],
        text_key,
    )
    files = [*train_files.values(), *validation_files.values()]
    size = sum(file.stat().st_size for group in files for file in group)
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 1
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f'.{output.name}.', suffix='.partial', dir=output.parent))
    folder.chmod(0o755)
    try:
        results = _ordered_map(encoder, batches, num_workers)
        counts = _write(_shown(results, size, show_progress), folder, loaded)
        _write_summary(folder, inputs, validation_inputs, tokenizer, loaded, encoder, counts)
        publish(folder, output)
    except BrokenProcessPool as error:
        raise RuntimeError(
            'a process that tokenises died, perhaps for lack of memory; try fewer num_workers'
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return counts


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse to write over what must not be replaced.

    Raises:
        FileExistsError: If there is something, and it is not to be replaced or not of this module.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f'output {output} exists; --overwrite replaces it')
    if not (output / SUMMARY_NAME).is_file():
        raise FileExistsError(
            f'output {output} was not made by preprocessing (it has no {SUMMARY_NAME}), '
            'so it is not overwritten'
        )


def domains_of(inputs: Iterable[str | Path], *, texts: bool = True) -> dict[str, list[Path]]:
    """Files by domain, domains and files in a fixed order.

    Args:
        inputs: As in `preprocess`.
        texts: As in `find_files`.

    Raises:
        FileNotFoundError: If an input is missing, or holds nothing that can be read.
        ValueError: If a name cannot be a folder's, or a file is given twice.
    """
    domains: dict[str, list[Path]] = {}
    for item in inputs:
        name, equals, path = str(item).partition('=')
        if equals and not Path(item).exists():
            if not name or '/' in name or name.startswith('.'):
                raise ValueError(f'input {item!r}: {name!r} cannot be the name of a folder')
            groups = find_domains(path, texts=texts).values()
            found = {name: [file for group in groups for file in group]}
        else:
            found = find_domains(item, texts=texts)
        for domain, files in found.items():
            domains.setdefault(domain, []).extend(files)
    for domain, files in domains.items():
        if len(set(files)) < len(files):
            raise ValueError(f'domain {domain!r}: an input is given twice')
    return dict(sorted(domains.items()))


def _batches(
    sources: Iterable[tuple[str | None, str, list[Path]]], text_key: str
) -> Iterator[_Batch]:
    for split, domain, files in sources:
        texts: list[str] = []
        characters, file_bytes = 0, 0
        for file in files:
            done = 0
            for document in read_documents(file, text_key=text_key):
                texts.append(document.text)
                characters += len(document.text)
                file_bytes += document.bytes_read - done
                done = document.bytes_read
                if characters >= _BATCH_CHARACTERS:
                    yield _Batch(split, domain, texts, file_bytes)
                    texts, characters, file_bytes = [], 0, 0
        if texts:
            yield _Batch(split, domain, texts, file_bytes)


class _Result(NamedTuple):
    batch: _Batch
    tokens: dict[str, _Tokens]


def _ordered_map(
    encode: Callable[[_Batch], dict[str, _Tokens]], batches: Iterator[_Batch], num_workers: int
) -> Iterator[_Result]:
    """Encode batches in parallel and give them back in order, never holding many."""
    if num_workers < 1:
        for batch in batches:
            yield _Result(batch, encode(batch))
        return
    # Forked: spawned processes would import torch again, which takes longer than a small corpus.
    pool = ProcessPoolExecutor(num_workers, mp_context=get_context('fork'))
    waiting: deque[tuple[_Batch, Future[dict[str, _Tokens]]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(encode, batch)))
            if len(waiting) > 2 * num_workers:
                first, future = waiting.popleft()
                yield _Result(first, future.result())
        while waiting:
            first, future = waiting.popleft()
            yield _Result(first, future.result())
    finally:
        pool.shutdown(cancel_futures=True)


def _shown(results: Iterator[_Result], size: int, show: bool) -> Iterator[_Result]:
    """Count results on a progress bar while they pass."""
    first = next(results, None)  # processes are forked before the bar's thread starts
    if first is None:
        return
    with Progress(
        TextColumn('{task.description}'),
        BarColumn(),
        TextColumn('{task.percentage:>3.0f}% {task.fields[tokens]}'),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not show,
    ) as progress:
        task = progress.add_task('tokenising', total=size, tokens='')
        tokens = 0
        for result in chain([first], results):
            tokens += sum(len(part.ids) for part in result.tokens.values())
            elapsed = progress.tasks[0].elapsed or 0
            rate = f', {tokens / elapsed:,.0f} tokens/s' if elapsed > 0.1 else ''
            progress.update(
                task,
                advance=result.batch.file_bytes,
                description=f'tokenising {result.batch.domain}',
                tokens=f'{tokens:,} tokens{rate}',
            )
            yield result


def _write(
    results: Iterator[_Result], folder: Path, tokenizer: Tokenizer
) -> dict[str, dict[str, Counts]]:
    counts: dict[str, dict[str, Counts]] = {split: {} for split in SPLITS}
    mark = {'type': type(tokenizer).__name__, 'hash': tokenizer.hash}
    for (_, domain), group in groupby(results, lambda r: (r.batch.split, r.batch.domain)):
        writers: dict[str, TokenFileWriter] = {}
        try:
            for result in group:
                for split, tokens in result.tokens.items():
                    if split not in writers:
                        writers[split] = TokenFileWriter(
                            folder / split / domain,
                            vocab_size=tokenizer.vocab_size,
                            tokenizer=mark,
                        )
                        counts[split][domain] = Counts()
                    writers[split].add_many(tokens.ids, tokens.lengths)
                    counts[split][domain].dropped += tokens.dropped
        except BaseException:
            for writer in writers.values():
                writer.abort()
            raise
        for split, writer in writers.items():
            counts[split][domain].documents = writer.num_documents
            counts[split][domain].tokens = writer.num_tokens
            if writer.num_documents:
                writer.close()
            else:
                writer.abort()
    if not any(count.documents for split in counts.values() for count in split.values()):
        raise ValueError('there is no document in the inputs, or none is long enough')
    return counts


def _write_summary(
    folder: Path,
    inputs: Sequence[str | Path],
    validation_inputs: Sequence[str | Path],
    tokenizer_path: str | Path,
    tokenizer: Tokenizer,
    encoder: _Encoder,
    counts: dict[str, dict[str, Counts]],
) -> None:
    summary = {
        'inputs': [str(path) for path in inputs],
        'validation_inputs': [str(path) for path in validation_inputs],
        'validation_fraction': encoder.validation_fraction,
        'add_bos': encoder.add_bos,
        'min_document_length': encoder.min_document_length,
        'tokenizer': {'path': str(tokenizer_path), 'hash': tokenizer.hash},
        'vocab_size': tokenizer.vocab_size,
        'counts': {
            split: {domain: asdict(count) for domain, count in domains.items()}
            for split, domains in counts.items()
        },
    }
    (folder / SUMMARY_NAME).write_text(json.dumps(summary, indent=2) + '\n')
