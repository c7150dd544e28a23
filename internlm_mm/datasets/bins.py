"""Which documents share a row, when none is cut."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np


class Bins(NamedTuple):
    """Documents in rows.

    Attributes:
        order: Indices of documents, row after row, [documents], int64.
        starts: Where in `order` each row starts, and the end of the last, [rows + 1], int64.
    """

    order: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> np.ndarray:
        """Documents of one row, in the order in which they lie in it."""
        return self.order[self.starts[index] : self.starts[index + 1]]

    @property
    def most(self) -> int:
        """Documents of the fullest row."""
        return int(np.diff(self.starts).max(initial=0))


def one_each(lengths: np.ndarray, capacity: int) -> Bins:
    """A row for every document."""
    _check(lengths, capacity)
    return Bins(np.arange(len(lengths)), np.arange(len(lengths) + 1))


def in_sequence(lengths: np.ndarray, capacity: int) -> Bins:
    """Documents as they come; a row ends before the first that does not fit into it."""
    _check(lengths, capacity)
    starts, space = [0], capacity
    for index, length in enumerate(lengths.tolist()):
        if length > space:
            starts.append(index)
            space = capacity
        space -= length
    if len(lengths):
        starts.append(len(lengths))
    return Bins(np.arange(len(lengths)), np.array(starts, np.int64))


def best_fit(lengths: np.ndarray, capacity: int) -> Bins:
    """Documents, longest first, each into the row that it leaves the least space in.

    Best-fit decreasing needs at most 11/9 of the fewest rows that can be, and nearly always less
    than 1 % more. Where the order of the documents happens to need fewer rows, it is kept.

    Source: Johnson et al., "Worst-case performance bounds for simple one-dimensional packing
    algorithms", SIAM J. Comput. 3(4), 1974.

    Args:
        lengths: Tokens of each document, [documents]; none above `capacity`.
        capacity: Tokens of a row.

    Raises:
        ValueError: If a document is longer than a row.
    """
    _check(lengths, capacity)
    row_of = np.empty(len(lengths), np.int64)
    spaces: list[int] = []  # those that some row has left, in order; at most `capacity` of them
    rows_with: dict[int, list[int]] = {}
    num_rows = 0
    for index in np.argsort(-lengths, kind='stable').tolist():
        length = int(lengths[index])
        place = bisect_left(spaces, length)
        if place < len(spaces):
            space = spaces[place]
            row = rows_with[space].pop()
            if not rows_with[space]:
                del rows_with[space]
                spaces.pop(place)
        else:
            row, space = num_rows, capacity
            num_rows += 1
        row_of[index] = row
        left = space - length
        if left:
            if left not in rows_with:
                rows_with[left] = []
                insort(spaces, left)
            rows_with[left].append(row)
    as_they_come = in_sequence(lengths, capacity)
    if len(as_they_come) <= num_rows:
        return as_they_come
    order = np.argsort(row_of, kind='stable')
    counts = np.bincount(row_of, minlength=num_rows)
    return Bins(order, np.concatenate([[0], np.cumsum(counts)]))


def _check(lengths: np.ndarray, capacity: int) -> None:
    if len(lengths) and int(lengths.max()) > capacity:
        index = int(np.argmax(lengths > capacity))
        raise ValueError(
            f'document {index} has {lengths[index]:,} tokens, more than the {capacity:,} of a row'
        )
