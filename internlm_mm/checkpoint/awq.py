"""Folders of 4-bit weights (AWQ) as plain ones again, to measure what the 4 bits cost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm_mm.checkpoint.hf_files import (
    INDEX_NAME,
    PICKLED_NAMES,
    SINGLE_NAME,
    HFWeights,
    publish_folder,
    write_json,
)
from internlm_mm.checkpoint.tensor_file import Entry, write_tensor_file
from internlm_mm.utils.progress import byte_bar

_PARTS = ('qweight', 'qzeros', 'scales')
# Where in its int32 each of eight neighbouring outputs lies, in bits. Source: the packing for the
# kernels of https://arxiv.org/abs/2306.00978, which LMDeploy and AutoAWQ write.
_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)


def dequantise(
    folder: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    show_progress: bool = False,
) -> None:
    """Write an AWQ folder as a plain one that computes the same: weights are what 4 bits gave.

    One tensor is in memory at a time.

    Args:
        folder: What `lmdeploy lite auto_awq` or AutoAWQ wrote.
        out: The folder to make.
        dtype: Of the weights there.
        overwrite: Whether an existing `out` is replaced.
        show_progress: Whether a bar on standard error shows how far it is.

    Raises:
        FileExistsError: If `out` exists and `overwrite` is False.
        FileNotFoundError: If there is no such folder.
        ValueError: If it is not quantised, or in another way.
    """
    folder, out = Path(folder), Path(out)
    config = _read_config(folder)
    group = config.pop('quantization_config')['group_size']
    weights = HFWeights(folder)
    entries = [Entry(name, dtype, shape) for name, shape in _shapes(weights, group)]
    config |= {'dtype': str(dtype).removeprefix('torch.')}
    config.pop('torch_dtype', None)
    with publish_folder(out, overwrite) as staging:
        for file in _other_files(folder):
            shutil.copyfile(file, staging / file.name)
        write_json(staging / 'config.json', config)
        total = sum(entry.nbytes for entry in entries)
        with byte_bar('writing', total, show_progress) as advance:

            def read() -> Iterator[Tensor]:
                for entry in entries:
                    yield _read(weights, entry.name).to(dtype)
                    advance(entry.nbytes)

            write_tensor_file(staging / SINGLE_NAME, entries, read(), {'format': 'pt'})


def unpack(packed: Tensor) -> Tensor:
    """Numbers of 4 bits, in their order.

    Args:
        packed: [rows, columns], int32, eight numbers each.

    Returns:
        [rows, 8 * columns], int32.
    """
    shifts = torch.tensor(_SHIFTS, dtype=torch.int32)
    return ((packed.unsqueeze(-1) >> shifts) & 15).flatten(1)


def dequantised(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """A weight as nn.Linear has it.

    Args:
        qweight: [inputs, outputs / 8], int32.
        qzeros: [inputs / group, outputs / 8], int32.
        scales: [inputs / group, outputs].

    Returns:
        [outputs, inputs], float32.
    """
    group = qweight.shape[0] // qzeros.shape[0]
    zeros, steps = (part.repeat_interleave(group, 0) for part in (unpack(qzeros), scales.float()))
    return ((unpack(qweight) - zeros) * steps).T.contiguous()


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / 'config.json'
    if not file.is_file():
        raise FileNotFoundError(f'{folder} is no Hugging Face model: config.json is missing')
    config = json.loads(file.read_text(encoding='utf-8'))
    quantised = config.get('quantization_config')
    if not quantised:
        raise ValueError(f'{file} has no quantization_config: the weights are plain already')
    expected = {'quant_method': 'awq', 'version': 'gemm', 'bits': 4, 'zero_point': True}
    for key, value in expected.items():
        if quantised.get(key) != value:
            raise ValueError(f'{file} has {key}={quantised.get(key)!r}; only {value!r} is read')
    return config


def _shapes(weights: HFWeights, group: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Plain weights by name, with their shapes.

    Raises:
        ValueError: If a part of a quantised weight is missing, or of another shape.
    """
    for name in weights:
        module, _, kind = name.rpartition('.')
        if kind not in _PARTS:
            yield name, tuple(weights.shape(name))
        elif kind == 'qweight':
            for part in _PARTS:
                if f'{module}.{part}' not in weights:
                    raise ValueError(f'{module} has {name!r} and no {part}')
            inputs, columns = weights.shape(name)
            expected = {
                'qzeros': [inputs // group, columns],
                'scales': [inputs // group, 8 * columns],
            }
            for part, shape in expected.items():
                found = weights.shape(f'{module}.{part}')
                if found != shape:
                    raise ValueError(f'{module}.{part} has shape {found}, expected {shape}')
            yield f'{module}.weight', (8 * columns, inputs)


def _read(weights: HFWeights, name: str) -> Tensor:
    if name in weights:
        return weights[name]
    module = name.removesuffix('.weight')
    return dequantised(*(weights[f'{module}.{part}'] for part in _PARTS))


def _other_files(folder: Path) -> list[Path]:
    """What lies beside the weights: tokenizer, chat template, generation_config.json."""
    ours = ('config.json', INDEX_NAME, SINGLE_NAME, *PICKLED_NAMES)
    kinds = ('.json', '.jinja', '.model', '.txt')
    return [f for f in sorted(folder.iterdir()) if f.suffix in kinds and f.name not in ours]
