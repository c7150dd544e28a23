"""How often each domain is read: the domain of row i, and which of its rows, without a list."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

from internlm_mm.datasets.permutation import Permutation
from internlm_mm.utils.suggest import did_you_mean

_BLOCKS = (1_000, 10_000, 100_000, 1_000_000)
_TOLERANCE = 0.01  # how far a domain's share may be from its weight, relative to the weight


class Mixture:
    """Draws rows from domains in fixed proportions.

    Rows come in blocks. Every block has the same number of rows of each domain, its quota, in an
    order of its own; so proportions are exact in every block, and both functions below need no
    history. A block has 1,000 rows, or the next power of ten that gives every domain its weight
    within 1 %.

    Args:
        weights: Shares of the domains, in any unit: they are divided by their sum.
        seed: Another seed, another order.

    Raises:
        ValueError: If a weight is not a positive number, or so small that a million rows hold none.
    """

    def __init__(self, weights: Sequence[float], seed: int = 0) -> None:
        if not weights or not all(w > 0 and math.isfinite(w) for w in weights):
            raise ValueError(f'weights of a mixture must be positive numbers, got {list(weights)}')
        total = sum(weights)
        shares = [weight / total for weight in weights]
        self.seed = seed
        for self.block in _BLOCKS:
            self.quotas = _apportion(shares, self.block)
            if all(
                abs(quota / self.block - share) <= _TOLERANCE * share
                for quota, share in zip(self.quotas, shares, strict=True)
            ):
                break
        if 0 in self.quotas:
            smallest = min(weights)
            raise ValueError(
                f'weight {smallest} of {total} is less than one row in {self.block:,}; '
                'leave the domain out'
            )
        self._bounds = [0, *accumulate(self.quotas)]

    def locate(self, index: int) -> tuple[int, int]:
        """The domain of row `index`, and how many rows of that domain come before it.

        The rows of one domain are numbered without gaps.
        """
        block, place = divmod(index, self.block)
        slot = Permutation(self.block, self.seed, 'mixture', block)(place)
        domain = bisect_right(self._bounds, slot) - 1
        return domain, block * self.quotas[domain] + slot - self._bounds[domain]


def _apportion(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers near `shares * total` that sum to `total`, by largest remainders."""
    exact = [share * total for share in shares]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def check_names(
    names: Mapping[str, float] | Sequence[str], domains: Sequence[str], key: str
) -> None:
    """Refuse names that are not among `domains`, and no names at all.

    Raises:
        ValueError: Naming the key, the unknown name and the nearest domain; or if there are none.
    """
    if len(names) == 0:
        raise ValueError(f'{key}={names!r} names no domain; there are {", ".join(domains)}')
    if isinstance(names, str):  # its letters would be taken for names
        raise ValueError(f'{key}={names!r}: expected a list of domains, as [{names!r}]')
    for name in names:
        if name not in domains:
            raise ValueError(
                f'{key} names an unknown domain {name!r}.{did_you_mean(name, domains)}'
            )
