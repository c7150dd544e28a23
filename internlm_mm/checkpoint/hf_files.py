"""The files of a Hugging Face folder: written whole or not at all, read when asked for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm_mm.checkpoint.pickled import check_pickled, dtype_named, open_tensors

DTYPES = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16'}
"""Dtypes a model may be exported in, and what safetensors calls them."""

INDEX_NAME = 'model.safetensors.index.json'
SINGLE_NAME = 'model.safetensors'
PICKLED_NAMES = ('pytorch_model.bin.index.json', 'pytorch_model.bin')


@contextmanager
def publish_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write in, which is named `out` when the block ends and removed when it fails."""
    if out.exists() and not overwrite:
        raise FileExistsError(f'{out} exists; choose another folder or overwrite it (--overwrite)')
    staging = out.with_name(out.name + '.tmp')
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    if out.exists():
        replaced = out.with_name(out.name + '.replaced')
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(out, replaced)
        os.replace(staging, out)
        shutil.rmtree(replaced)
    else:
        os.replace(staging, out)


def write_weights(
    folder: Path,
    names: Mapping[str, str],
    state: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    max_shard_bytes: int,
) -> None:
    itemsize = getattr(torch, dtype).itemsize
    sizes = {name: itemsize * torch.Size(shape).numel() for name, shape in shapes.items()}
    shards = _plan_shards(sizes, max_shard_bytes)
    weight_map = {}
    for index, shard in enumerate(shards, start=1):
        file = (
            f'model-{index:05}-of-{len(shards):05}.safetensors' if len(shards) > 1 else SINGLE_NAME
        )
        renamed = {name: _rename(name, names) for name in shard}
        weight_map.update(dict.fromkeys(renamed.values(), file))
        _write_shard(folder / file, renamed, state, shapes, dtype)
    index_content = {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': weight_map}
    write_json(folder / INDEX_NAME, index_content)


def _plan_shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = max_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _write_shard(
    path: Path,
    names: Mapping[str, str],
    state: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
) -> None:
    """Write one safetensors file, holding one tensor in memory at a time.

    The format: length of the header as 8 bytes, the header as JSON, then the tensors end to end.
    """
    torch_dtype = getattr(torch, dtype)
    header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
    end = 0
    for name, stored_name in names.items():
        start, end = end, end + torch_dtype.itemsize * torch.Size(shapes[name]).numel()
        header[stored_name] = {
            'dtype': DTYPES[dtype],
            'shape': list(shapes[name]),
            'data_offsets': [start, end],
        }
    encoded = json.dumps(header, separators=(',', ':')).encode()
    encoded += b' ' * (-len(encoded) % 8)  # tensors begin at a multiple of 8 bytes
    with open(path, 'wb') as file:
        file.write(len(encoded).to_bytes(8, 'little') + encoded)
        for name in names:
            tensor = state[name]
            if tuple(tensor.shape) != shapes[name]:
                raise ValueError(
                    f'{name} has shape {list(tensor.shape)} in the checkpoint, '
                    f'{list(shapes[name])} in the model'
                )
            data = tensor.to(torch_dtype).contiguous().flatten().view(torch.uint8)
            file.write(data.numpy().data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


class HFWeights(Mapping[str, Tensor]):
    """The weights of a Hugging Face folder by our names, each read when it is asked for.

    Args:
        folder: Holds one `model.safetensors`, or several with an index; or `pytorch_model.bin`.
        names: Beginnings of our names, and what Hugging Face has in their place.

    Raises:
        FileNotFoundError: If there are no weights, or a file that the index names is missing.
        ValueError: If a file is truncated or damaged, or lacks a weight that the index names.
    """

    def __init__(self, folder: Path, names: Mapping[str, str]) -> None:
        files = _weight_files(folder)
        ours = {theirs: mine for mine, theirs in names.items()}
        self._places = {
            _rename(name, ours): (path, name)
            for name, path in files.items()
            if not name.endswith('rotary_emb.inv_freq')  # stored by old exporters; computed here
        }

    def __getitem__(self, name: str) -> Tensor:
        path, stored_name = self._places[name]
        with open_tensors(path) as file:
            return file.get_tensor(stored_name)

    def shape(self, name: str) -> list[int]:
        """Shape of a weight, without reading it."""
        path, stored_name = self._places[name]
        with open_tensors(path) as file:
            return list(file.get_slice(stored_name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a weight, without reading it."""
        path, stored_name = self._places[name]
        with open_tensors(path) as file:
            return dtype_named(file.get_slice(stored_name).get_dtype())

    def check_files(self) -> None:
        """Read whatever has checksums once, and compare; safetensors have none.

        Raises:
            ValueError: Naming the file that is damaged.
        """
        for path in sorted({path for path, _ in self._places.values()}):
            check_pickled(path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _rename(name: str, table: Mapping[str, str]) -> str:
    for ours, theirs in table.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(f'weight {name!r} begins with none of {", ".join(table)}')


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
