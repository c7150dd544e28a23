"""Token files of records that an encoder spells: conversations and preferences alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

from internlm_mm.datasets.token_cache import cached_folder
from internlm_mm.datasets.token_writer import TokenFileWriter
from internlm_mm.tokenizers import Tokenizer
from internlm_mm.version import __version__

SHOWN = 5  # malformed records that are told one by one

Record = TypeVar('Record')
Encoding = TypeVar('Encoding')


class RecordEncoder(Protocol):
    """What decides how records are spelt."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def template(self) -> Any: ...

    @property
    def max_tokens(self) -> int: ...

    @property
    def overlong(self) -> str: ...

    @property
    def add_ending(self) -> bool: ...


class SkipCounts(Protocol):
    """Where malformed records are counted."""

    skipped: int
    messages: list[str]


def cached_tokens(
    domains: Mapping[str, Sequence[Path]],
    encoder: RecordEncoder,
    cache_dir: str | Path,
    *,
    counts_name: str,
    source: Mapping[str, Any],
    write: Callable[[Path, Sequence[Path]], Any],
) -> Path:
    """Token files by domain, made unless they are there.

    Args:
        domains: Files by domain.
        encoder: Spells records.
        cache_dir: Where the folder is made.
        counts_name: File of the counts, by domain, as JSON.
        source: What else than the encoder decides what is made.
        write: Makes one domain's token file of its files; returns its counts, a dataclass.

    Returns:
        A folder with `tokens/DOMAIN`, a token file each, and the counts.
    """
    whole = {
        'version': __version__,
        'tokenizer': encoder.tokenizer.hash,
        'template': repr(encoder.template),
        'max_tokens': encoder.max_tokens,
        'overlong': encoder.overlong,
        'add_ending': encoder.add_ending,
        **source,
    }

    def make(folder: Path) -> None:
        counts = {
            name: asdict(write(folder / 'tokens' / name, files)) for name, files in domains.items()
        }
        text = json.dumps(counts, indent=2, ensure_ascii=False)
        (folder / counts_name).write_text(text + '\n', encoding='utf-8')

    return cached_folder(cache_dir, whole, make)


def masked_writer(path: Path, tokenizer: Tokenizer) -> TokenFileWriter:
    """Of a token file that says which tokens are learned."""
    mark = {'type': type(tokenizer).__name__, 'hash': tokenizer.hash}
    return TokenFileWriter(
        path, vocab_size=tokenizer.vocab_size, tokenizer=mark, has_loss_mask=True
    )


def encode_records(
    records: Iterable[Record | ValueError],
    encode: Callable[[Record], Encoding],
    on_error: str,
    counts: SkipCounts,
) -> Iterator[tuple[Record, Encoding]]:
    """Records with what was made of them.

    Args:
        records: In the place of a malformed one its error.
        encode: Raises ValueError if a record cannot be spelt.
        on_error: 'raise', or 'skip' to leave malformed records out.
        counts: Of what was left out; the first few are told.

    Raises:
        ValueError: The first error, with 'raise'.
    """
    for record in records:
        try:
            if isinstance(record, ValueError):
                raise record
            encoded = encode(record)
        except ValueError as error:
            if on_error == 'raise':
                raise
            counts.skipped += 1
            counts.messages += [str(error)] * (len(counts.messages) < SHOWN)
            continue
        yield record, encoded
