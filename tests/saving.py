"""A checkpoint of two tensors, for tests of what becomes of it."""

from pathlib import Path

import torch
from torch import Tensor

from internlm_mm.checkpoint.checkpointer import Checkpointer


def tensors(value: float = 1.0) -> dict[str, Tensor]:
    return {'model.weight': torch.full((3, 2), value), 'optimizer.weight.step': torch.tensor(value)}


def saved(path: Path, value: float = 1.0, **options) -> Path:
    Checkpointer(async_save=False).save(path, tensors(value), {'iter': value}, **options)
    return path
