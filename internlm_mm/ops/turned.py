"""Turns matrices of bytes at the speed of memory (Triton).

Import it only where Triton is: the names of a kernel are globals of its module.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS, _WARPS = 128, 128, 8  # a tile, long enough both ways to be read and written whole


@triton.jit
def _turn(source, target, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> None:
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.load(source + row[:, None] * columns + column[None, :], mask=inside)
    tl.store(target + column[:, None] * rows + row[None, :], tl.trans(tile), mask=tl.trans(inside))


def turn(matrix: Tensor) -> Tensor:
    """A copy of a matrix with rows for columns: `matrix.t().contiguous()`.

    Args:
        matrix: On a GPU, contiguous, of numbers of one byte, [rows, columns].

    Returns:
        [columns, rows], in the same dtype.

    Raises:
        ValueError: If it is not such a matrix.
    """
    is_such = matrix.is_cuda and matrix.ndim == 2 and matrix.itemsize == 1
    if not (is_such and matrix.is_contiguous()):
        raise ValueError(
            f'{matrix.dtype} on {matrix.device} of shape {list(matrix.shape)} and strides '
            f'{matrix.stride()}: expected a contiguous matrix of bytes on a GPU'
        )
    rows, columns = matrix.shape
    found = matrix.new_empty(columns, rows)
    if matrix.numel():
        grid = (triton.cdiv(columns, _COLUMNS), triton.cdiv(rows, _ROWS))
        with torch.cuda.device(matrix.device):  # Triton launches on the current one
            _turn[grid](
                matrix.view(torch.uint8), found.view(torch.uint8), rows, columns,
                ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_WARPS,
            )  # fmt: skip
    return found
