"""What tasks of calls and programs have in common: rates of some samples, classes of errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

NOT_ENDED = 'not_ended'
"""Class of a text that went on until its room ended."""


def rate(records: Iterable[Record], right: Callable[[Record], Any]) -> float | None:
    """Share of records that are right; None where there is none."""
    found = [bool(right(record)) for record in records]
    return sum(found) / len(found) if found else None


def known_rates(rates: Mapping[str, float | None]) -> dict[str, float]:
    """Those that there are."""
    return {name: value for name, value in rates.items() if value is not None}


def count_errors(records: Sequence[Record]) -> dict[str, int]:
    """How many samples had an error of each class: 'errors/CLASS', the most frequent first."""
    found = Counter(kind for record in records for kind in dict.fromkeys(record['errors']))
    return {f'errors/{kind}': count for kind, count in found.most_common()}
