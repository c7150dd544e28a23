"""InternLM's own checkpoints: a folder of `model_tp{t}_pp{p}.pt`, read as one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm_mm.checkpoint.internlm_files import Shards, Where
from internlm_mm.checkpoint.internlm_layout import (
    KINDS,
    W2_IS_UP,
    Kind,
    Meaning,
    check_format,
    cut_dim,
    layout_of,
)
from internlm_mm.checkpoint.internlm_sizes import read_sizes
from internlm_mm.checkpoint.pickled import PickledTensors, check_pickled
from internlm_mm.registry import MODELS
from internlm_mm.utils.suggest import did_you_mean
from internlm_mm.utils.weight_layout import Stored, WeightLayout


@dataclass(frozen=True)
class _Place:
    """Where one of our weights is."""

    where: Where
    stored: Stored
    dim: int | None


def import_internlm(
    folder: str | Path,
    format: str = 'auto',
    settings: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], InternLMWeights]:
    """Read a folder of InternLM's own shards, of any number of parts and stages.

    Args:
        folder: Holds `model_tp{t}_pp{p}.pt` and perhaps `model_config.pt`.
        format: 'internlm-2023', 'internevo', or 'auto': the shapes of `w2` tell.
        settings: What the folder does not tell, or tells wrongly: arguments of the model, and
            `adapt_hf` and `norm_head` of InternEvo's configs.

    Returns:
        A config that `MODELS.build` takes, and the weights by our names, each read when asked for.

    Raises:
        FileNotFoundError: If a shard is missing.
        ValueError: If shards are damaged or do not fit together, or something is not told.
    """
    check_format(format)
    shards = Shards(Path(folder))
    kind = _kind_of(shards)
    sizes = read_sizes(shards, kind, settings or {})
    w2_is_up = _w2_is_up(shards, kind, format)
    meaning = Meaning(
        head_dim=sizes.head_dim,
        q_per_kv=sizes.q_per_kv,
        w2_is_up=w2_is_up,
        interleaved=not sizes.adapt_hf,
        norm_head=sizes.norm_head,
    )
    weights = InternLMWeights(shards, kind, layout_of(kind, meaning))
    weights.check(sizes.config)
    return sizes.config, weights


def _kind_of(shards: Shards) -> Kind:
    for name in shards.tensors:
        if '.moe_layer.' in name:
            raise ValueError(f'{shards.folder} is a mixture of experts ({name!r}); dense ones are')
    for kind in KINDS:
        if any(f'{kind.layers}.0.{module}.weight' in shards.tensors for module in kind.layer):
            own = next(iter(kind.layer))
            if f'{kind.layers}.0.{own}.weight' in shards.tensors:
                return kind
    wanted = ', '.join(f'{kind.layers}.0.{next(iter(kind.layer))}.weight' for kind in KINDS)
    found = ', '.join(list(shards.tensors)[:3])
    raise ValueError(
        f'{shards.folder} is no model that is known here: it has none of {wanted}; '
        f'its first tensors are {found}'
    )


def _w2_is_up(shards: Shards, kind: Kind, format: str) -> bool:
    """What `w2` is, by its shape or, where that is square, by what was said."""
    names = [f'{kind.layers}.0.{kind.mlp}.{w}.weight' for w in ('w1', 'w2')]
    gate, second = (shards.shape(name) for name in names)
    if kind.layers == 'layers':  # of InternEvo alone
        if format not in ('auto', 'internevo'):
            raise ValueError(
                f'format={format!r} does not fit: {shards.folder} is a {kind.model_type}, '
                "which is 'internevo'"
            )
        return False
    if gate[0] == gate[1]:
        if format == 'auto':
            raise ValueError(
                f'{shards.folder}: w2 is {gate[0]} x {gate[1]}, so shapes do not tell whether it '
                'is the up projection (--format internlm-2023) or the down projection '
                '(--format internevo)'
            )
        return W2_IS_UP[format]
    by_shape = second == gate
    if format != 'auto' and by_shape != W2_IS_UP[format]:
        right = next(name for name, is_up in W2_IS_UP.items() if is_up == by_shape)
        raise ValueError(
            f'format={format!r} does not fit: {names[1]!r} in {shards.folder} has shape '
            f'{list(second)}, which is {right!r}'
        )
    return by_shape


class InternLMWeights(Mapping[str, Tensor]):
    """The weights of a folder by our names, put together from their parts when asked for.

    Args:
        shards: The folder.
        kind: Whose names they have.
        layout: Names and packings.

    Raises:
        ValueError: If a tensor is none of this kind of model.
    """

    def __init__(self, shards: Shards, kind: Kind, layout: WeightLayout) -> None:
        self.shards, self._layout = shards, layout
        split = shards.vocabulary_split
        if shards.tensor_degree > 1:  # a part has all columns only if rows are cut
            hidden = shards.shape(f'{kind.layers}.0.{kind.mlp}.w1.weight')[1]
            split = shards.shape(f'{kind.embedding}.weight')[1] == hidden
        self._places: dict[str, _Place] = {}
        self._mapped: list[PickledTensors] = []
        for name, where in shards.tensors.items():
            try:
                parts = layout.ours(name)
            except ValueError:
                near = did_you_mean(name, [rule.theirs for rule in layout.rules])
                raise ValueError(
                    f'{shards.folder}: {shards.describe(where)} is no weight of '
                    f'{kind.model_type}.{near}'
                ) from None
            for ours, stored in parts.items():
                self._places[ours] = _Place(where, stored, cut_dim(ours, split))

    def check(self, config: Mapping[str, Any]) -> None:
        """Compare every part with what a model of this config has.

        Raises:
            ValueError: Naming the first tensor that is missing, left over, or of another shape.
        """
        with torch.device('meta'):
            model = MODELS.build(dict(config))
        wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
        tensors = self.shards.tensors
        for stored, names in self._layout.groups(wanted).items():
            if stored not in tensors:
                raise ValueError(
                    f'{self.shards.folder}: {stored!r} is missing (layers are numbered through '
                    f'the whole model, here {self.shards.num_layers})'
                )
            shapes = [self._part_shape(name, wanted[name]) for name in names]
            parts = [torch.empty(shape, device='meta') for shape in shapes]
            packing = self._layout.packing(stored)
            expected = tuple((parts[0] if packing is None else packing.join(parts)).shape)
            found = self.shards.shape(stored)
            if found != expected:
                raise ValueError(
                    f'{self.shards.folder}: {self.shards.describe(tensors[stored])} has shape '
                    f'{list(found)}; expected {list(expected)}'
                )
        extra = sorted(set(self._places) - set(wanted))
        if extra:
            where = self._places[extra[0]].where
            raise ValueError(
                f'{self.shards.folder}: {self.shards.describe(where)} is left over: '
                f'{type(model).__name__} has no such weight'
            )

    def _part_shape(self, name: str, whole: tuple[int, ...]) -> tuple[int, ...]:
        dim, degree = self._places[name].dim, self.shards.tensor_degree
        return tuple(n // degree if axis == dim else n for axis, n in enumerate(whole))

    def check_files(self) -> None:
        """Read all files once and compare their checksums.

        Raises:
            ValueError: Naming the file that is damaged.
        """
        for stage in self.shards.files:
            for file in stage:
                check_pickled(file.path)

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        files = self.shards.files[place.where.stage]
        if files is not self._mapped:  # stages are read one after the other
            for file in self._mapped:
                file.release()
            self._mapped = files
        if place.dim is None:  # every part has it; where they differ, the first counts
            return place.stored.take(files[0].get_tensor(place.where.key)).clone()
        whole = torch.empty(self.shape(name), dtype=self.dtype(name))
        size = whole.shape[place.dim] // len(files)
        for index, file in enumerate(files):
            part = place.stored.take(file.get_tensor(place.where.key))
            whole.narrow(place.dim, index * size, size).copy_(part)
        return whole

    def __contains__(self, name: object) -> bool:
        return name in self._places  # a mapping's own way is to read it

    def shape(self, name: str) -> list[int]:
        """Shape of a weight, without reading it."""
        place = self._places[name]
        files = self.shards.files[place.where.stage]
        part = torch.empty(files[0].shapes[place.where.key], device='meta')
        shape = list(place.stored.take(part).shape)
        if place.dim is not None:
            shape[place.dim] *= len(files)
        return shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a weight, without reading it."""
        place = self._places[name]
        return self.shards.files[place.where.stage][0].dtypes[place.where.key]

    def stored_name(self, name: str) -> str:
        """What the shards call the tensor that a weight is a part of; it may be missing."""
        return self._layout.stored(name).name

    def describe(self, name: str) -> str:
        """A weight for a message: what it is called, and where."""
        return self.shards.describe(self._places[name].where)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
