"""The files of a Hugging Face folder: written whole or not at all, read when asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm_mm.checkpoint.pickled import check_pickled, dtype_named, open_tensors
from internlm_mm.checkpoint.storage import METADATA_FILE
from internlm_mm.checkpoint.tensor_file import Entry, plan_shards, write_tensor_file
from internlm_mm.utils.publish import publish
from internlm_mm.utils.weight_layout import Stored, WeightLayout

DTYPES = ('float32', 'float16', 'bfloat16')
"""Dtypes a model may be exported in."""

INDEX_NAME = 'model.safetensors.index.json'
SINGLE_NAME = 'model.safetensors'
PICKLED_NAMES = ('pytorch_model.bin.index.json', 'pytorch_model.bin')

_ROWS = 4096  # of a weight that are compared at once


def is_hf_folder(path: str | Path) -> bool:
    """Whether `path` holds weights in Hugging Face's layout."""
    names = (SINGLE_NAME, INDEX_NAME, *PICKLED_NAMES)
    return any((Path(path) / name).is_file() for name in names)


@contextmanager
def publish_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write in, which is named `out` when the block ends and removed when it fails.

    Raises:
        FileExistsError: If `out` exists and `overwrite` is False, or it holds what no conversion
            has left: a run's work dir, say.
    """
    if out.exists():
        if not overwrite:
            hint = 'choose another folder or overwrite it (--overwrite)'
            raise FileExistsError(f'{out} exists; {hint}')
        _check_replaceable(out)
    staging = out.with_name(out.name + '.tmp')
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    publish(staging, out)


_CONVERTED = ('model_tp*.pt', 'adapter_config.json')
"""What conversions leave besides folders of Hugging Face."""


def _check_replaceable(out: Path) -> None:
    """Raise FileExistsError unless `out` is what a conversion leaves: files, or `iter_0` alone.

    A run's work dir may hold weeks of work, and what else was named by mistake more than that.
    """
    if not out.is_dir():
        raise FileExistsError(f'{out} is not overwritten: it is no folder')
    content = sorted(out.iterdir())
    if not content or [path.name for path in content] == ['iter_0']:
        return
    folder = next((path.name for path in content if path.is_dir()), None)
    if folder is not None:
        found = f'the folder {folder!r}, which no conversion left there'
    elif (out / METADATA_FILE).is_file():
        found = 'a checkpoint of internlm_mm'
    elif not (
        is_hf_folder(out) or any(file for pattern in _CONVERTED for file in out.glob(pattern))
    ):
        found = f'{content[0].name!r} and no weights'
    else:
        return
    raise FileExistsError(f'{out} is not overwritten: it holds {found}')


def write_weights(
    folder: Path,
    layout: WeightLayout,
    state: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    max_shard_bytes: int,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Write safetensors and their index, with one stored tensor in memory at a time.

    Args:
        folder: Where they go; it must exist.
        layout: Names and packings in the files.
        state: Weights by our names, each read once.
        shapes: Theirs, by our names: what is written, in this order.
        dtype: One of `DTYPES`.
        max_shard_bytes: Largest file; a tensor larger than this has a file of its own.
        on_bytes: Called with the size of each tensor when it is written.

    Raises:
        ValueError: If a name has no place in the layout, or a weight is not of its shape.
    """
    groups = layout.groups(shapes)
    entries = [
        Entry(stored, getattr(torch, dtype), _packed_shape(layout, stored, parts, shapes))
        for stored, parts in groups.items()
    ]

    def read(shard: list[Entry]) -> Iterator[Tensor]:
        for entry in shard:
            yield _packed(layout, entry, groups[entry.name], state, shapes)
            if on_bytes is not None:
                on_bytes(entry.nbytes)

    shards = plan_shards(entries, max_shard_bytes)
    weight_map = {}
    for index, shard in enumerate(shards, start=1):
        file = (
            f'model-{index:05}-of-{len(shards):05}.safetensors' if len(shards) > 1 else SINGLE_NAME
        )
        weight_map.update(dict.fromkeys([entry.name for entry in shard], file))
        write_tensor_file(folder / file, shard, read(shard), {'format': 'pt'})
    size = sum(entry.nbytes for entry in entries)
    index_content = {'metadata': {'total_size': size}, 'weight_map': weight_map}
    write_json(folder / INDEX_NAME, index_content)


def _packed_shape(
    layout: WeightLayout, stored: str, parts: list[str], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...]:
    packing = layout.packing(stored)
    if packing is None:
        return shapes[parts[0]]
    return tuple(packing.join([torch.empty(shapes[part], device='meta') for part in parts]).shape)


def _packed(
    layout: WeightLayout,
    entry: Entry,
    parts: list[str],
    state: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
) -> Tensor:
    tensors = []
    for part in parts:
        tensor = state[part]
        if tuple(tensor.shape) != tuple(shapes[part]):
            raise ValueError(
                f'{part} has shape {list(tensor.shape)} in the checkpoint, '
                f'{list(shapes[part])} in the model'
            )
        tensors.append(tensor.to(entry.dtype))
    packing = layout.packing(entry.name)
    return tensors[0] if packing is None else packing.join(tensors)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


class HFWeights(Mapping[str, Tensor]):
    """The weights of a Hugging Face folder by our names, each read when it is asked for.

    Args:
        folder: Holds one `model.safetensors`, or several with an index; or `pytorch_model.bin`.
        layout: Names and packings in the files; without one, names are the folder's own.

    Raises:
        FileNotFoundError: If there are no weights, or a file that the index names is missing.
        ValueError: If a file is truncated or damaged, lacks a weight that the index names, or has
            one that has no place in the layout.
    """

    def __init__(self, folder: Path, layout: WeightLayout | None = None) -> None:
        self._layout = layout
        self._places: dict[str, tuple[Path, Stored]] = {}
        for name, path in _weight_files(folder).items():
            try:
                parts = {name: Stored(name, None, 0)} if layout is None else layout.ours(name)
            except ValueError as error:
                raise ValueError(f'{path}: {error}') from None
            self._places |= {ours: (path, stored) for ours, stored in parts.items()}

    def __getitem__(self, name: str) -> Tensor:
        path, stored = self._places[name]
        with open_tensors(path) as file:
            return _take(path, stored, file.get_tensor(stored.name))

    def __contains__(self, name: object) -> bool:
        return name in self._places  # a mapping's own way is to read it

    def shape(self, name: str) -> list[int]:
        """Shape of a weight, without reading it."""
        path, stored = self._places[name]
        with open_tensors(path) as file:
            whole = torch.empty(file.get_slice(stored.name).get_shape(), device='meta')
        return list(_take(path, stored, whole).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a weight, without reading it."""
        path, stored = self._places[name]
        with open_tensors(path) as file:
            return dtype_named(file.get_slice(stored.name).get_dtype())

    def stored_name(self, name: str) -> str:
        """What the files call the tensor that a weight is, or is a part of; it may be missing."""
        if name in self._places or self._layout is None:
            return self._places[name][1].name
        return self._layout.stored(name).name

    def describe(self, name: str) -> str:
        """A weight for a message: what it is called, where, and of what it is a part."""
        path, stored = self._places[name]
        part = '' if stored.packing is None else f'{name.split(".")[-2]} of '
        return f'{part}{stored.name!r} in {path.name}'

    def check_files(self) -> None:
        """Read whatever has checksums once, and compare; safetensors have none.

        Raises:
            ValueError: Naming the file that is damaged.
        """
        for path in sorted({path for path, _ in self._places.values()}):
            check_pickled(path)

    def tie(self, alias: str, name: str) -> bool:
        """Take `alias` for another name of `name`, if they are the same or only one is there.

        Returns:
            Whether they are one now, with the name `name`; both stay where they differ.
        """
        if alias not in self:
            return True
        if name in self and not self._same(alias, name):
            return False
        place = self._places.pop(alias)
        self._places.setdefault(name, place)
        return True

    def _same(self, first: str, second: str) -> bool:
        """Whether two weights hold the same numbers, read in pieces."""
        if self.shape(first) != self.shape(second) or self.dtype(first) != self.dtype(second):
            return False
        (one, stored), (other, stored_too) = self._places[first], self._places[second]
        with open_tensors(one) as file, open_tensors(other) as file_too:
            slices = file.get_slice(stored.name), file_too.get_slice(stored_too.name)
            return all(
                torch.equal(*(part[start : start + _ROWS] for part in slices))
                for start in range(0, self.shape(first)[0], _ROWS)
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _take(path: Path, stored: Stored, tensor: Tensor) -> Tensor:
    try:
        return stored.take(tensor)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f'{path}: {stored.name!r} has shape {list(tensor.shape)}, which does not fit: {error}'
        ) from error


def _weight_files(folder: Path) -> dict[str, Path]:
    """Every stored weight's file, by its name there. Safetensors are taken where there are both."""
    for index_name, single_name in ((INDEX_NAME, SINGLE_NAME), PICKLED_NAMES):
        if (folder / index_name).is_file():
            return _indexed_files(folder / index_name)
        if (folder / single_name).is_file():
            with open_tensors(folder / single_name) as file:
                return dict.fromkeys(file.keys(), folder / single_name)
    names = ', '.join((SINGLE_NAME, INDEX_NAME, *reversed(PICKLED_NAMES)))
    raise FileNotFoundError(f'{folder} holds no weights: none of {names}')


def _indexed_files(index: Path) -> dict[str, Path]:
    try:
        weight_map = dict(json.loads(index.read_text(encoding='utf-8'))['weight_map'])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{index} is truncated or damaged: {error!r}') from error
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f'{index} places {name!r} in {file!r}; expected a file beside it')
    files = {name: index.parent / file for name, file in weight_map.items()}
    for path in sorted(set(files.values())):
        if not path.is_file():
            raise FileNotFoundError(f'{index} names {path.name}, which is missing')
        with open_tensors(path) as file:
            held = set(file.keys())
        named = {name for name, other in files.items() if other == path}
        if named - held:
            raise ValueError(f'{path} lacks {min(named - held)!r}, which {index.name} places there')
    return files
