"""Keys and values of tokens already seen, so that generating one token costs one token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LayerCache(NamedTuple):
    """One layer's part of a `KVCache`, for one forward.

    Attributes:
        keys: All slots up to the longest in use, [rows, length, kv_heads, head_dim].
        values: Like `keys`.
        slots: Where each new token is written, [rows, new].
        mask: True where a new token may see a slot, [rows, 1, new, length].
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    mask: Tensor

    def write(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' keys and values, [rows, new, kv_heads, head_dim]; return all."""
        rows = torch.arange(k.shape[0], device=k.device).unsqueeze(1)
        self.keys[rows, self.slots] = k
        self.values[rows, self.slots] = v
        return self.keys, self.values


class KVCache:
    """Preallocated keys and values of every layer; a token's position is its slot.

    A query sees slots up to its own position. Rows of different lengths are therefore padded on
    the right and need no mask of their own: what padding wrote lies beyond every query, and is
    overwritten when the row grows into it.

    Args:
        layers: Names of the model's layers.
        rows: Sequences generated together.
        capacity: Tokens a row can hold, prompt included.
        num_kv_heads: Key/value heads.
        head_dim: Width of one head.
        dtype: Of keys and values.
        device: Where they lie.
    """

    def __init__(
        self,
        layers: Sequence[str],
        rows: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (len(layers), rows, capacity, num_kv_heads, head_dim)
        # Zeros: a masked slot is multiplied by a weight of 0, and 0 * NaN would be NaN.
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        self._layers = list(layers)
        self.capacity = capacity
        self.length = 0
        """Slots in use in the longest row, padding included."""

    def extend(self, position_ids: Tensor) -> dict[str, LayerCache]:
        """Make room for new tokens.

        Args:
            position_ids: Position of each new token in its row, [rows, new]; below
                `length + new`.

        Returns:
            What each layer writes to and reads from, by the layer's name.

        Raises:
            ValueError: If the cache is too small.
        """
        length = self.length + position_ids.shape[1]
        if length > self.capacity:
            raise ValueError(f'{length} tokens do not fit in a KV cache of {self.capacity}')
        self.length = length
        slots = torch.arange(length, device=position_ids.device)
        mask = (slots <= position_ids.unsqueeze(-1)).unsqueeze(1)
        return {
            name: LayerCache(keys[:, :length], values[:, :length], position_ids, mask)
            for name, keys, values in zip(self._layers, self._keys, self._values, strict=True)
        }
