"""Storage of distributed checkpoints without pickle: safetensors shards and JSON metadata.

PyTorch's own file storage unpickles its metadata on every load. This is the same job behind the
same interface (`torch.distributed.checkpoint.StorageWriter` and `StorageReader`), in files that
cannot run code and that any safetensors tool opens.

A folder holds one `shard_R.safetensors` for each rank that wrote something and `metadata.json`:
`tensors[name] = {dtype, shape, chunks: [{offsets, sizes, file, key}]}`.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from internlm_mm.checkpoint.disk import write_file
from internlm_mm.checkpoint.tensor_file import Entry, write_tensor_file

METADATA_FILE = 'metadata.json'
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Location:
    """Where one chunk of a tensor lies.

    Attributes:
        file: Name of the shard, relative to the checkpoint.
        key: The chunk's name inside the shard.
    """

    file: str
    key: str


@dataclass(frozen=True, slots=True)
class _Written:
    location: Location
    file_size: int
    file_crc32: int


def write_safetensors(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> tuple[int, int]:
    """Write CPU tensors to a safetensors file without a second copy in memory, and reach the disk.

    Args:
        path: The file; its folder exists.
        tensors: Names and tensors.

    Returns:
        Size in bytes, and CRC-32 of the content, taken in the same pass.
    """
    items = list(tensors)
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in items]
    return write_tensor_file(path, entries, (tensor for _, tensor in items))


class SafetensorsWriter(StorageWriter):
    """Writes each rank's chunks to a shard of its own; the coordinator adds the metadata.

    Args:
        path: The folder, shared by all ranks. Files already in it are overwritten.
        on_finish: Called once, by the coordinator, after every rank has written, with
            {file name: (size in bytes, CRC-32)}. Publishing happens there.
    """

    def __init__(
        self, path: Path, on_finish: Callable[[dict[str, tuple[int, int]]], None] | None = None
    ) -> None:
        super().__init__()
        self.path = Path(path)
        self.on_finish = on_finish

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """Any path will do."""
        return isinstance(checkpoint_id, (str, os.PathLike))

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Point the writer at another folder."""
        if checkpoint_id is not None:
            self.path = Path(checkpoint_id)

    def set_up_storage_writer(
        self,
        is_coordinator: bool,  # noqa: ARG002  torch's signature
        *args: object,
        **kwargs: object,
    ) -> None:
        """Make the folder."""
        self.path.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuse what a safetensors file cannot hold; the rest follows when ranks are known."""
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                raise TypeError(
                    f'{item.index.fqn}: only tensors are stored, scalars belong into state.json'
                )
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give every rank's plan the name of its shard."""
        return [
            replace(plan, storage_data=f'shard_{rank}.safetensors')
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's chunks."""
        file = plan.storage_data
        items = [(_chunk_key(item.index), item) for item in plan.items]
        done: Future[list[WriteResult]] = Future()
        if not items:
            done.set_result([])
            return done
        size, checksum = write_safetensors(
            self.path / file,
            [(key, cast(Tensor, planner.resolve_data(item)).cpu()) for key, item in items],
        )
        done.set_result(
            [
                WriteResult(
                    index=item.index,
                    size_in_bytes=size,
                    storage_data=_Written(Location(file, key), size, checksum),
                )
                for key, item in items
            ]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write what lies where, then publish."""
        where = {result.index: result.storage_data for rank in results for result in rank}
        files = {
            written.location.file: (written.file_size, written.file_crc32)
            for written in where.values()
        }
        tensors = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)  # prepare_local_plan saw to it
            tensors[name] = {
                'dtype': str(stored.properties.dtype).removeprefix('torch.'),
                'shape': list(stored.size),
                'chunks': [
                    {
                        'offsets': list(chunk.offsets),
                        'sizes': list(chunk.sizes),
                        'file': where[MetadataIndex(name, chunk.offsets)].location.file,
                        'key': where[MetadataIndex(name, chunk.offsets)].location.key,
                    }
                    for chunk in stored.chunks
                ],
            }
        text = json.dumps({'version': FORMAT_VERSION, 'tensors': tensors}).encode()
        files[METADATA_FILE] = write_file(self.path / METADATA_FILE, text)
        if self.on_finish is not None:
            self.on_finish(files)


class SafetensorsReader(StorageReader):
    """Reads what `SafetensorsWriter` wrote, any slice of it, on any number of ranks."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._locations: dict[MetadataIndex, Location] = {}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """Whether there is metadata to read."""
        return (Path(checkpoint_id) / METADATA_FILE).is_file()

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Point the reader at another folder."""
        if checkpoint_id is not None:
            self.path = Path(checkpoint_id)

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        """Names, shapes and chunks of everything stored."""
        described = read_tensor_index(self.path)
        tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for name, entry in described.items():
            tensors[name] = TensorStorageMetadata(
                properties=TensorProperties(dtype=getattr(torch, entry['dtype'])),
                size=torch.Size(entry['shape']),
                chunks=[
                    ChunkStorageMetadata(
                        offsets=torch.Size(chunk['offsets']), sizes=torch.Size(chunk['sizes'])
                    )
                    for chunk in entry['chunks']
                ],
            )
            for chunk in entry['chunks']:
                index = MetadataIndex(name, torch.Size(chunk['offsets']))
                self._locations[index] = Location(chunk['file'], chunk['key'])
        return Metadata(state_dict_metadata=tensors, storage_data=self._locations)

    def set_up_storage_reader(
        self,
        metadata: Metadata,
        is_coordinator: bool,  # noqa: ARG002  torch's signature
        *args: object,
        **kwargs: object,
    ) -> None:
        """Take over where the chunks lie, which only the coordinator may have read."""
        self._locations = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Nothing to add: every rank reads for itself."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Nothing to add: every rank reads for itself."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the planned slices into the tensors that wait for them."""
        by_file: dict[str, list] = {}
        for item in plan.items:
            location = self._locations[item.storage_index]
            by_file.setdefault(location.file, []).append((location.key, item))
        for file, items in by_file.items():
            with safe_open(self.path / file, framework='pt') as shard:
                for key, item in items:
                    part = tuple(
                        slice(start, start + length)
                        for start, length in zip(item.storage_offsets, item.lengths, strict=True)
                    )
                    data = shard.get_slice(key)[part] if part else shard.get_tensor(key)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(data.reshape(target.shape))
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, each read whole when it is asked for.

    Needs no process group and holds nothing in memory, so a tool may walk a checkpoint larger than
    RAM.

    Args:
        path: Checkpoint folder.
        prefix: Only names that begin with this, which is then left out.
    """

    def __init__(self, path: Path, prefix: str = '') -> None:
        self.path = Path(path)
        self.entries = {
            name.removeprefix(prefix): entry
            for name, entry in read_tensor_index(self.path).items()
            if name.startswith(prefix)
        }

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        whole = torch.empty(entry['shape'], dtype=getattr(torch, entry['dtype']))
        for chunk in entry['chunks']:
            with safe_open(self.path / chunk['file'], framework='pt') as shard:
                part = tuple(
                    slice(start, start + size)
                    for start, size in zip(chunk['offsets'], chunk['sizes'], strict=True)
                )
                whole[part].copy_(shard.get_tensor(chunk['key']).reshape(chunk['sizes']))
        return whole

    def __contains__(self, name: object) -> bool:
        return name in self.entries  # a mapping's own way is to read it

    def __iter__(self):
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self.entries[name]['shape'])


def read_tensor_index(path: Path) -> dict[str, dict]:
    """What `metadata.json` says of every stored tensor.

    Raises:
        FileNotFoundError: If the folder is not a checkpoint.
        ValueError: If a newer version of the format wrote it.
    """
    file = Path(path) / METADATA_FILE
    if not file.is_file():
        raise FileNotFoundError(f'{path} is not a checkpoint: it has no {METADATA_FILE}')
    content = json.loads(file.read_text())
    if content['version'] > FORMAT_VERSION:
        raise ValueError(
            f'{file}: format version {content["version"]} is newer than {FORMAT_VERSION}, '
            'the newest this version of internlm_mm reads'
        )
    return content['tensors']


def _chunk_key(index: MetadataIndex) -> str:
    offset = index.offset
    if offset is None or not any(offset):
        return index.fqn
    return f'{index.fqn}@{",".join(map(str, offset))}'
