from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from internlm_mm.datasets.record_tokens import (
    SHOWN,
    cached_tokens,
    encode_records,
    masked_writer,
)
from internlm_mm.datasets.token_file import TokenFile


@dataclass
class Counts:
    skipped: int = 0
    messages: list[str] = field(default_factory=list)


class Letters:
    """A tokenizer of a letter a token."""

    hash = 'letters'
    vocab_size = 128


class Encoder:
    tokenizer = Letters()
    template = 'plain'
    max_tokens = 8
    overlong = 'split'
    add_ending = True


def test_malformed_records_are_counted_and_the_first_told() -> None:
    records = ['a', ValueError('x:2, broken'), 'b'] + [ValueError(f'x:{i}') for i in range(9)]
    counts = Counts()
    assert list(encode_records(records, str.upper, 'skip', counts)) == [('a', 'A'), ('b', 'B')]
    assert counts.skipped == 10 and counts.messages[0] == 'x:2, broken'
    assert len(counts.messages) == SHOWN


def test_so_are_records_that_cannot_be_spelt() -> None:
    def encode(record: str) -> int:
        return int(record)

    counts = Counts()
    assert list(encode_records(['1', 'one', '2'], encode, 'skip', counts)) == [('1', 1), ('2', 2)]
    assert counts.skipped == 1 and "'one'" in counts.messages[0]


def test_the_first_is_raised() -> None:
    found = encode_records(['a', ValueError('x:2')], str.upper, 'raise', Counts())
    assert next(found) == ('a', 'A')
    with pytest.raises(ValueError, match='x:2'):
        next(found)


def test_what_goes_wrong_behind_them_is_not_skipped() -> None:
    counts = Counts()
    with pytest.raises(ValueError, match='of the caller'):
        for _ in encode_records(['a'], str.upper, 'skip', counts):
            raise ValueError('of the caller')
    assert counts.skipped == 0


def test_made_once_for_every_source(tmp_path: Path) -> None:
    made = []

    def write(path: Path, files: list[Path]) -> Counts:
        made.append((path.name, files))
        with masked_writer(path, Letters()) as writer:
            writer.add([1, 2, 3], np.array([False, True, True]))
        return Counts(skipped=len(files))

    def ask(source: dict[str, str]) -> Path:
        domains = {'one': [Path('x')], 'two': []}
        options = {'counts_name': 'counts.json', 'source': source, 'write': write}
        return cached_tokens(domains, Encoder(), tmp_path, **options)

    folder = ask({'format': 'a'})
    assert ask({'format': 'a'}) == folder and made == [('one', [Path('x')]), ('two', [])]
    assert '"skipped": 1' in (folder / 'counts.json').read_text()
    tokens = TokenFile(folder / 'tokens' / 'two')
    assert tokens.has_loss_mask and len(tokens) == 1
    assert ask({'format': 'b'}) != folder and len(made) == 4
