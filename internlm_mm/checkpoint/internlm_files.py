"""The files of InternLM's own checkpoints, and the names in them numbered through all stages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from internlm_mm.checkpoint.pickled import PickledTensors
from internlm_mm.utils.suggest import did_you_mean

_SHARD = re.compile(r'model_tp(\d+)(?:_wp(\d+))?_pp(\d+)(?:_dp(\d+))?\.pt')
_KEY = re.compile(r'(?:(\d+)\.)?(?:model\.)?(.+)')  # chunk of an interleaved pipeline, wrapper
_LAYER = re.compile(r'(blocks|layers)\.(\d+)\.(.+)')


class Where(NamedTuple):
    """A tensor's column of files, one for each tensor-parallel part, and its name in them."""

    stage: int
    key: str


class Shards:
    """The files of a folder and the names in them, with layers numbered through the whole model.

    Args:
        folder: Holds `model_tp{t}_pp{p}.pt`.

    Attributes:
        files: By stage, then by tensor-parallel part.
        tensors: Where each tensor is, by its name without wrappers and with its layer's number.

    Raises:
        FileNotFoundError: If there are no shards, or one of the grid is missing.
        ValueError: If one cannot be read, or shards do not fit together.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        grid = _find_shards(folder)
        self.tensor_degree = 1 + max(t for t, _ in grid)
        stages = 1 + max(p for _, p in grid)
        self.files = [
            [PickledTensors(grid[t, p]) for t in range(self.tensor_degree)] for p in range(stages)
        ]
        self.num_layers = 0
        self.tensors: dict[str, Where] = {}
        self.vocabulary_split = False
        for stage in self.files:
            _check_column(stage)
        self._number()

    def _number(self) -> None:
        """Number layers through: chunks first, since stages take turns in every chunk."""
        parts: dict[tuple[int, int], dict[str, str]] = {}
        for stage, files in enumerate(self.files):
            for key in files[0].keys():
                match = _KEY.fullmatch(key)
                assert match is not None  # it matches any name
                name = match[2]
                if '.word_embeddings.' in name:  # the layer that InternLM took for a split of rows
                    name, self.vocabulary_split = name.replace('.word_embeddings.', '.'), True
                parts.setdefault((int(match[1] or 0), stage), {})[name] = key
        for (_, stage), names in sorted(parts.items()):
            layers = 0
            for name, key in names.items():
                match = _LAYER.fullmatch(name)
                if match is not None:
                    layers = max(layers, int(match[2]) + 1)
                    name = f'{match[1]}.{self.num_layers + int(match[2])}.{match[3]}'
                if name in self.tensors:
                    other = self.describe(self.tensors[name])
                    here = self.describe(Where(stage, key))
                    raise ValueError(f'{self.folder} holds {name!r} twice: {other}, and {here}')
                self.tensors[name] = Where(stage, key)
            self.num_layers += layers

    def describe(self, where: Where, part: int = 0) -> str:
        """A tensor's name and file, for messages."""
        return f'{where.key!r} in {self.files[where.stage][part].path.name}'

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one part of a tensor.

        Raises:
            ValueError: If there is no such tensor.
        """
        if name not in self.tensors:
            raise ValueError(f'{self.folder}: {name!r} is missing{self._nearest(name)}')
        where = self.tensors[name]
        return self.files[where.stage][0].shapes[where.key]

    def _nearest(self, name: str) -> str:
        # Layers differ only in their numbers, so the nearest of thousands is not looked for.
        prefix = name.rsplit('.', 2)[0]
        near = [other for other in self.tensors if other.startswith(prefix)]
        return f'.{did_you_mean(name, near)}' if near else ''


def _find_shards(folder: Path) -> dict[tuple[int, int], Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f'{folder} does not exist: expected a folder of model_tp*_pp*.pt')
    grid = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith('model_moe_layer'):
            raise ValueError(f'{path}: experts of a mixture are not read; dense models are')
        match = _SHARD.fullmatch(path.name)
        if match is None:
            continue
        if int(match[2] or 0) or int(match[4] or 0):
            raise ValueError(
                f'{path}: parts of weight parallelism (wp) and FSDP (dp) are not read; save with '
                'wp=1 and without FSDP, or convert to Hugging Face with InternEvo first'
            )
        grid[int(match[1]), int(match[3])] = path
    if not grid:
        steps = [p.parent.name for p in folder.glob('*/model_tp*.pt')]
        hint = f'; its folder {max(steps, key=_step)} does' if steps else ''
        raise FileNotFoundError(f'{folder} holds no model_tp*_pp*.pt{hint}')
    tensor, stages = (1 + max(place[axis] for place in grid) for axis in (0, 1))
    missing = [
        f'model_tp{t}_pp{p}.pt' for p in range(stages) for t in range(tensor) if (t, p) not in grid
    ]
    if missing:
        raise FileNotFoundError(
            f'{folder}: {missing[0]} is missing'
            + (f' (and {len(missing) - 1} more)' if len(missing) > 1 else '')
            + f'; the others are of {tensor} tensor-parallel parts and {stages} pipeline stages'
        )
    return grid


def _step(name: str) -> tuple[int, str]:
    return (int(name) if name.isdigit() else -1, name)


def _check_column(files: list[PickledTensors]) -> None:
    """The parts of one stage hold the same tensors in the same shapes, row biases aside."""
    first = files[0]
    for file in files[1:]:
        for name in first.keys() ^ file.shapes.keys():
            if name.endswith(('out_proj.bias', 'wo.bias')) and name in first.shapes:
                continue  # it is added once, so that other parts need not have it
            here, there = (first, file) if name in first.shapes else (file, first)
            raise ValueError(f'{there.path} has no {name!r}, which {here.path.name} has')
        for name, shape in file.shapes.items():
            if shape != first.shapes[name]:
                raise ValueError(
                    f'{file.path}: {name!r} has shape {list(shape)}, but '
                    f'{list(first.shapes[name])} in {first.path.name}'
                )


def is_internlm_folder(path: str | Path) -> bool:
    """Whether `path` holds shards of InternLM's own checkpoints."""
    folder = Path(path)
    return folder.is_dir() and any(_SHARD.fullmatch(file.name) for file in folder.iterdir())
