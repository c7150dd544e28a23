"""Checkpoints of weights alone, written tensor by tensor from whatever can be read so."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from internlm_mm.checkpoint.checkpointer import publish_checkpoint
from internlm_mm.checkpoint.disk import write_file
from internlm_mm.checkpoint.step_folders import STATE_FILE
from internlm_mm.checkpoint.storage import FORMAT_VERSION, METADATA_FILE
from internlm_mm.checkpoint.tensor_file import Entry, plan_shards, write_tensor_file


class LazyWeights(Protocol):
    """Weights by our names, each read when it is asked for, and described without being read."""

    def __getitem__(self, name: str) -> Tensor:
        """The weight."""

    def shape(self, name: str) -> list[int]:
        """Its shape."""

    def dtype(self, name: str) -> torch.dtype:
        """Its dtype in the file."""


def entries_of(
    weights: LazyWeights, names: list[str], dtype: torch.dtype | None = None
) -> list[Entry]:
    """What weights will be in a checkpoint: names, shapes, and dtypes, their own if None."""
    return [
        Entry(f'model.{name}', dtype or weights.dtype(name), tuple(weights.shape(name)))
        for name in names
    ]


def write_weights_checkpoint(
    path: Path,
    weights: LazyWeights,
    entries: list[Entry],
    state: Mapping[str, Any],
    texts: Mapping[str, str],
    folders: Mapping[str, Path],
    *,
    max_shard_bytes: int = 4 * 10**9,
    on_tensor: Callable[[Entry, Tensor], None] | None = None,
) -> None:
    """Write a checkpoint folder as `Checkpointer` does, with one tensor in memory at a time.

    Args:
        path: The final folder `iter_N`; it gets this name when it is whole.
        weights: Read one by one.
        entries: Of `entries_of`; decides dtypes.
        state: Content of `state.json`.
        texts: Further files, {name: content}.
        folders: Folders to copy in, {name: source}.
        max_shard_bytes: Largest file; a tensor larger than this has a file of its own.
        on_tensor: Called with each tensor before it is written, to look at it or to show progress.
    """
    staging = path.with_name(path.name + '.tmp')
    staging.mkdir(parents=True)
    files: dict[str, tuple[int, int]] = {}
    tensors: dict[str, dict[str, Any]] = {}

    def read(shard: list[Entry]) -> Any:
        for entry in shard:
            tensor = weights[entry.name.removeprefix('model.')].to(entry.dtype)
            if on_tensor is not None:
                on_tensor(entry, tensor)
            yield tensor
            del tensor

    for number, shard in enumerate(plan_shards(entries, max_shard_bytes)):
        file = f'shard_{number}.safetensors'
        files[file] = write_tensor_file(staging / file, shard, read(shard))
        for entry in shard:
            chunk = {
                'offsets': [0] * len(entry.shape),
                'sizes': list(entry.shape),
                'file': file,
                'key': entry.name,
            }
            tensors[entry.name] = {
                'dtype': str(entry.dtype).removeprefix('torch.'),
                'shape': list(entry.shape),
                'chunks': [chunk],
            }
    text = json.dumps({'version': FORMAT_VERSION, 'tensors': tensors}).encode()
    files[METADATA_FILE] = write_file(staging / METADATA_FILE, text)
    publish_checkpoint(
        staging, path, files, {**texts, STATE_FILE: json.dumps(state, indent=1)}, folders
    )
