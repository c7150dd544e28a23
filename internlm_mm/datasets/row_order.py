"""In which order the rows of several domains come: a function of the seed and the index."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from numbers import Real

from internlm_mm.datasets.mixture import Mixture
from internlm_mm.datasets.permutation import Permutation


class RowOrder:
    """An endless sequence of rows.

    Without `weights` an epoch is every row once, in an order of its own. With `weights` domains
    come in these proportions and each goes through its own epochs.

    Args:
        domains: Their names.
        num_rows: Rows of each, at least 1.
        weights: Share of each domain, by name, in any unit; None reads rows as they are.
        shuffle: False keeps the order; then there are no `weights`.
        seed: Another seed, another order.

    Raises:
        ValueError: See `check_order`.
    """

    def __init__(
        self,
        domains: Sequence[str],
        num_rows: Sequence[int],
        *,
        weights: Mapping[str, float] | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        check_order(weights, shuffle)
        self.domains = list(domains)
        self.num_rows = list(num_rows)
        self.shuffle = shuffle
        self.seed = seed
        self._starts = [0, *accumulate(num_rows)]
        self._mixture = (
            Mixture([weights[name] for name in domains], seed) if weights is not None else None
        )

    def __len__(self) -> int:
        return self._starts[-1]

    def locate(self, index: int) -> tuple[int, int]:
        """The domain of row `index`, and its place among that domain's rows; any index >= 0."""
        if index < 0:
            raise IndexError(f'rows are counted from 0, got {index}')
        if self._mixture is not None:
            domain, count = self._mixture.locate(index)
            size = self.num_rows[domain]
            epoch, row = divmod(count, size)
            return domain, Permutation(size, self.seed, epoch, self.domains[domain])(row)
        epoch, row = divmod(index, len(self))
        if self.shuffle:
            row = Permutation(len(self), self.seed, epoch)(row)
        domain = bisect_right(self._starts, row) - 1
        return domain, row - self._starts[domain]


def check_order(weights: Mapping[str, float] | None, shuffle: bool) -> None:
    """Refuse a mixture that is none, or is not to be shuffled.

    Raises:
        ValueError: With the key, and the domain and its share if that is wrong.
    """
    if weights is not None and not isinstance(weights, Mapping):
        raise ValueError(f'weights={weights!r}: expected a share for each domain, as dict(code=1)')
    for domain, share in (weights or {}).items():
        is_number = isinstance(share, Real) and not isinstance(share, bool)
        if not (is_number and 0 < share < math.inf):
            raise ValueError(f'weights[{domain!r}]={share!r} must be a positive number')
    if weights is not None and not shuffle:
        raise ValueError('weights mix domains, which shuffle=False would not; give one of them')
