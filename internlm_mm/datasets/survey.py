"""What becomes of a set's tokens: how many are learned, cut off, and wasted on padding."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from internlm_mm.datasets.browsing import Sheet, is_padding
from internlm_mm.datasets.packed import PACKINGS, PackedRows
from internlm_mm.structures import IGNORE_INDEX
from internlm_mm.tokenizers import Tokenizer

MOST_ROWS = 2000
_BAR = 24  # characters of the longest bar


@dataclass
class DomainSurvey:
    """The rows of one domain that were looked at.

    Attributes:
        rows: How many.
        documents: In them, whole or in part.
        tokens: Of these documents.
        learned: Tokens with a loss.
        padding: Tokens that fill rows up.
        cut: Documents that the end of a row cuts.
    """

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    learned: int = 0
    padding: int = 0
    cut: int = 0


@dataclass
class Survey:
    """What was found.

    Attributes:
        num_rows: Rows of an epoch.
        looked_at: Rows that were looked at, spread evenly over it.
        seq_len: Tokens of a row.
        domains: By name; '' where there are none.
        lengths: Tokens of each document: of the whole set where they are known, else of the rows
            that were looked at.
    """

    num_rows: int
    looked_at: int
    seq_len: int
    domains: dict[str, DomainSurvey] = field(default_factory=dict)
    lengths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def padding(self) -> float:
        """Share of the rows looked at that is padding."""
        return sum(one.padding for one in self.domains.values()) / self._places

    @property
    def learned(self) -> float:
        """Share of the rows looked at that is learned."""
        return sum(one.learned for one in self.domains.values()) / self._places

    @property
    def _places(self) -> int:
        return max(self.looked_at * self.seq_len, 1)

    def rows(self) -> Sheet:
        """What rows hold, by domain."""
        of = '' if self.looked_at == self.num_rows else f' ({self.looked_at:,} rows looked at)'
        places = self.seq_len
        return Sheet(
            f'rows of {self.seq_len:,} tokens, {self.num_rows:,} an epoch{of}',
            (
                'domain',
                'rows',
                'documents',
                'learned',
                'context',
                'padding',
                'cut',
            ),
            [
                (
                    name or '-',
                    f'{one.rows:,}',
                    f'{one.documents:,}',
                    f'{one.learned / one.rows / places:.1%}',
                    f'{(one.tokens - one.learned) / one.rows / places:.1%}',
                    f'{one.padding / one.rows / places:.1%}',
                    f'{one.cut:,}',
                )
                for name, one in self.domains.items()
            ],
        )

    def histogram(self) -> Sheet:
        """How long documents are, in powers of two; those of more than a row are told apart."""
        lengths = self.lengths
        top = int(lengths.max(initial=1))
        edges = sorted({2**power for power in range(3, top.bit_length() + 1)} | {self.seq_len})
        edges = [edge for edge in edges if edge < top] + [top]
        counts = np.histogram(lengths, [0.5, *(edge + 0.5 for edge in edges)])[0].tolist()
        most = max(counts, default=1) or 1
        rows: list[tuple[str, str, str]] = []
        low = 1
        for edge, count in zip(edges, counts, strict=True):
            if count or rows:
                longer = ' > a row' if low > self.seq_len else ''
                bar = '█' * -(-count * _BAR // most)
                rows.append((f'{low:,} to {edge:,}{longer}', f'{count:,}', bar))
            low = edge + 1
        return Sheet('tokens a document', ('tokens', 'documents', ''), rows)


def survey(dataset: Any, most: int = MOST_ROWS) -> Survey:
    """Look at rows of an epoch, and at documents' lengths.

    Args:
        dataset: Of rows.
        most: Rows to look at; where there are more, that many spread evenly over the epoch.
    """
    num_rows = rows_an_epoch(dataset) or most
    count = min(num_rows, most)
    names = list(getattr(dataset, 'domains', ())) or ['']
    found: dict[str, DomainSurvey] = {}
    lengths: list[int] = []
    for index in (place * num_rows // count for place in range(count)):
        row = dataset[index]
        name = names[0 if row.domain_ids is None else int(row.domain_ids[0])]
        one = found.setdefault(name, DomainSurvey())
        one.rows += 1
        bounds = [0, *np.cumsum(row.lengths).tolist()]
        for start, stop in itertools.pairwise(bounds):
            if is_padding(row, start, stop):
                one.padding += stop - start
                continue
            has_loss = row.labels[start:stop] != IGNORE_INDEX
            one.documents += 1
            one.tokens += stop - start
            one.learned += int(has_loss.sum())
            one.cut += bool(has_loss[-1])
            lengths.append(stop - start)
    ordered = {name: found[name] for name in names if name in found}
    if isinstance(dataset, PackedRows):
        files = zip(dataset.domains, dataset.files, strict=True)
        offsets = {name: np.asarray(file.offsets) for name, file in files}
        all_lengths = np.concatenate([np.diff(some) for some in offsets.values()])
        if dataset.packing == 'documents' and count == num_rows:
            for name, one in ordered.items():  # labels do not tell where the next has no loss
                one.cut = _cut(offsets[name], dataset.seq_len)
    else:
        all_lengths = np.array(lengths, np.int64)
    return Survey(num_rows, count, dataset.seq_len, ordered, all_lengths)


def rows_an_epoch(dataset: Any) -> int | None:
    """How many rows there are; None where rows go on without end, as they may."""
    return len(dataset) if hasattr(dataset, '__len__') else None


def _cut(offsets: np.ndarray, seq_len: int) -> int:
    """Documents, end to end, that have tokens in more than one row."""
    return int((offsets[:-1] // seq_len != (offsets[1:] - 1) // seq_len).sum())


def packings(dataset: Any) -> list[str]:
    """A line for each way to pack that was not taken, and what it would waste."""
    if not isinstance(dataset, PackedRows) or dataset.together > 1:
        return []
    lines = []
    for packing, make in PACKINGS.items():
        if packing == dataset.packing:
            continue
        rows = 0
        try:
            for file in dataset.files:
                if make is None:
                    rows += -(-file.num_tokens // dataset.seq_len)
                else:
                    rows += len(make(np.diff(file.offsets), dataset.seq_len))
        except ValueError:  # a document does not fit into a row
            lines.append(f'packing={packing!r} cannot be: documents are longer than a row')
            continue
        waste = 1 - dataset.num_tokens / (rows * dataset.seq_len)
        lines.append(f'packing={packing!r} would make {rows:,} rows, {waste:.1%} of them padding')
    return lines


_COUNTS = {
    'conversations': 'used',
    'pairs': 'used',
    'skipped': 'malformed',
    'overlong': 'too long',
    'cut': 'over a row',
    'documents': 'documents',
    'tokens': 'tokens',
    'trained': 'learned',
    'compared': 'compared',
    'lost': 'cut off',
}


def records(dataset: Any) -> Sheet | None:
    """What became of each domain's records; None for data that keeps no count of them."""
    counts: Mapping[str, Any] | None = getattr(dataset, 'counts', None)
    if not counts:
        return None
    first = next(iter(counts.values()))
    keys = [key for key in _COUNTS if hasattr(first, key)]
    return Sheet(
        'records',
        ('domain', *(_COUNTS[key] for key in keys)),
        [(name, *(f'{getattr(one, key):,}' for key in keys)) for name, one in counts.items()],
    )


def facts(dataset: Any, tokenizer: Tokenizer | None) -> dict[str, str]:
    """What a dataset is, by name."""
    template = getattr(dataset, 'template', None)
    known = {
        'data': type(dataset).__name__,
        'domains': ', '.join(dataset.domains),
        'seq_len': f'{dataset.seq_len:,}',
        'packing': repr(dataset.packing) if hasattr(dataset, 'packing') else '',
        'chat_template': '' if template is None else template.name,
    }
    if tokenizer is not None:
        known['tokenizer'] = f'{type(tokenizer).__name__}, {tokenizer.vocab_size:,} ids'
    return {name: text for name, text in known.items() if text}


def sheets(dataset: Any) -> list[Sheet]:
    """What became of records, what rows hold, and how long documents are."""
    found = survey(dataset)
    counted = records(dataset)
    return [*([] if counted is None else [counted]), found.rows(), found.histogram()]
