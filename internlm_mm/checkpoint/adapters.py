"""Checkpoints with adapters: their parts, and the weights that come out when they are merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from internlm_mm.checkpoint.base import find_base
from internlm_mm.checkpoint.foreign import is_foreign, open_source
from internlm_mm.checkpoint.step_folders import check_whole, read_config, read_model_state
from internlm_mm.registry import ADAPTERS
from internlm_mm.utils.adapters import is_adapter, layer_of


class Parts(NamedTuple):
    """A model with adapters, unread.

    Attributes:
        model: Config of the model, without `adapter`.
        adapter: What `ADAPTERS` builds of the config's `adapter`.
        base: Frozen weights by our names.
        tensors: The adapters' tensors by our names.
        base_path: Where the frozen weights are.
    """

    model: dict[str, Any]
    adapter: Any
    base: Mapping[str, Tensor]
    tensors: dict[str, Tensor]
    base_path: Path

    def merged(self) -> Mapping[str, Tensor]:
        """The weights of the model without adapters that computes the same."""
        return Merged(self.base, self.tensors, self.adapter)


def open_parts(checkpoint: Path, base: str | Path | None = None) -> Parts | None:
    """The parts of a checkpoint; None where its model has no adapters.

    Args:
        checkpoint: `iter_N`, whole.
        base: Where its frozen weights are now, if not where they were in training.

    Raises:
        FileNotFoundError: If they are not there.
        ValueError: If they are others, or `base` is given to a checkpoint that holds its own.
    """
    model = dict(read_config(checkpoint)['model'])
    said = model.pop('adapter', None)
    found = find_base(checkpoint, base) if said is not None else None
    if base is not None and found is None:
        raise ValueError(f'base={base}: {checkpoint} holds all of its weights itself')
    if said is None:
        return None
    state = read_model_state(checkpoint)
    tensors = {name: state[name] for name in state if is_adapter(name)}
    adapter = build_adapter(said)
    if found is None:
        own = _Without(state, set(tensors))
        return Parts(model, adapter, own, tensors, checkpoint)
    return Parts(model, adapter, read_frozen(found.path, found.options), tensors, found.path)


def build_adapter(said: Mapping[str, Any]) -> Any:
    """What `model.adapter` of a config names."""
    return ADAPTERS.build(dict(said), default_args={'type': 'LoRA'})


def read_frozen(path: Path, options: Mapping[str, Any] | None = None) -> Mapping[str, Tensor]:
    """Weights by our names, of a checkpoint or of another program's folder."""
    if options or is_foreign(path):
        return open_source(path, **(options or {})).weights
    check_whole(path)
    return read_model_state(path)


class Merged(Mapping[str, Tensor]):
    """Frozen weights with adapters merged into them, each when it is read.

    Args:
        base: Frozen weights by our names.
        tensors: The adapters', by our names.
        adapter: Has `merge(weight, parts)`.
    """

    def __init__(
        self, base: Mapping[str, Tensor], tensors: Mapping[str, Tensor], adapter: Any
    ) -> None:
        self._base, self._adapter = base, adapter
        self._parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            layer = layer_of(name)
            self._parts.setdefault(f'{layer}.weight', {})[name.removeprefix(f'{layer}.')] = tensor
        for name in self._parts:
            if name not in base:
                raise ValueError(f'an adapter is of {name!r}, which is no weight of the model')

    def __getitem__(self, name: str) -> Tensor:
        weight = self._base[name]
        parts = self._parts.get(name)
        if parts is None:
            return weight
        with torch.no_grad():
            return self._adapter.merge(weight, parts)

    def __contains__(self, name: object) -> bool:
        return name in self._base

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


class _Without(Mapping[str, Tensor]):
    """A mapping without some of its names."""

    def __init__(self, state: Mapping[str, Tensor], away: set[str]) -> None:
        self._state = state
        self._names = [name for name in state if name not in away]

    def __getitem__(self, name: str) -> Tensor:
        return self._state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
