"""Shuffling without a shuffled list: the place of one index at a time, from a key."""

from __future__ import annotations

import hashlib
import math

_MASK = (1 << 64) - 1
_ROUNDS = 8


def hash_key(*key: object) -> bytes:
    """Hash numbers and names to 64 bytes that are the same on every machine."""
    return hashlib.blake2b('\0'.join(map(str, key)).encode()).digest()


def _mix(value: int) -> int:
    """Scramble 64 bits (the finaliser of SplitMix64)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Permutation:
    """A pseudo-random bijection of `range(size)`, computed per index in constant memory.

    An index is two digits in bases whose product just exceeds `size`; a Feistel network adds to one
    digit a keyed function of the other, in turns. A result outside the range is put in again until
    it falls inside (cycle walking), which is rare: the product is less than size + sqrt(size) + 1.

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, sections 4, 5.

    Args:
        size: How many indices there are; at least 1.
        key: Numbers and names, for example a seed and an epoch.
    """

    def __init__(self, size: int, *key: object) -> None:
        if size < 1:
            raise ValueError(f'size must be at least 1, got {size}')
        self.size = size
        self._base = math.isqrt(size - 1) + 1  # the least number whose square is >= size
        self._other = -(-size // self._base)
        digest = hash_key(*key)
        self._keys = [int.from_bytes(digest[i * 8 : i * 8 + 8], 'little') for i in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Where `index` goes.

        Raises:
            IndexError: If `index` is not in `range(size)`.
        """
        if not 0 <= index < self.size:
            raise IndexError(f'index {index} is outside range({self.size})')
        while True:
            index = self._network(index)
            if index < self.size:
                return index

    def _network(self, index: int) -> int:
        base, other = self._base, self._other
        high, low = divmod(index, base)
        for turn in range(0, _ROUNDS, 2):
            high = (high + _mix(low ^ self._keys[turn])) % other
            low = (low + _mix(high ^ self._keys[turn + 1])) % base
        return high * base + low
