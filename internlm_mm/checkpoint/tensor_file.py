"""Writing safetensors files tensor by tensor, so that one of any size takes the memory of one."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from internlm_mm.checkpoint.disk import SummedFile

DTYPE_CODES = {
    torch.float64: 'F64',
    torch.float32: 'F32',
    torch.float16: 'F16',
    torch.bfloat16: 'BF16',
    torch.float8_e4m3fn: 'F8_E4M3',
    torch.float8_e5m2: 'F8_E5M2',
    torch.int64: 'I64',
    torch.int32: 'I32',
    torch.int16: 'I16',
    torch.int8: 'I8',
    torch.uint8: 'U8',
    torch.bool: 'BOOL',
}
"""What safetensors calls dtypes."""


class Entry(NamedTuple):
    """What a file will hold.

    Attributes:
        name: The tensor's name in the file.
        dtype: As it is stored.
        shape: Likewise.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def plan_shards(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    """Deal tensors out to files of at most `max_bytes`; a larger one has a file of its own."""
    shards: list[list[Entry]] = [[]]
    room = max_bytes
    for entry in entries:
        if entry.nbytes > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(entry)
        room -= entry.nbytes
    return shards


def write_tensor_file(
    path: Path,
    entries: Sequence[Entry],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> tuple[int, int]:
    """Write CPU tensors to a safetensors file, one at a time, and reach the disk.

    Args:
        path: The file; its folder exists.
        entries: What is written, in order: the header comes before the first tensor.
        tensors: The tensors, each given up once it is written.
        metadata: Texts for the file's header.

    Returns:
        Size in bytes, and CRC-32 of the content, taken in the same pass.

    Raises:
        ValueError: If a tensor is none that its entry describes.
    """
    header: dict[str, object] = {'__metadata__': dict(metadata)} if metadata else {}
    position = 0
    for entry in entries:
        header[entry.name] = {
            'dtype': DTYPE_CODES[entry.dtype],
            'shape': list(entry.shape),
            'data_offsets': [position, position + entry.nbytes],
        }
        position += entry.nbytes
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)  # the data begins aligned
    with SummedFile(path) as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for entry, tensor in zip(entries, tensors, strict=True):
            if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
                raise ValueError(
                    f'{entry.name} is {list(tensor.shape)} of {tensor.dtype}; expected '
                    f'{list(entry.shape)} of {entry.dtype}'
                )
            file.write(_raw_bytes(tensor.detach().contiguous()))
            del tensor  # before the next one is made
    return file.size, file.crc32


def _raw_bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
