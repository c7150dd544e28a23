"""Adds numbers of a narrow dtype to wider sums, in one pass at the speed of memory (Triton).

torch's own addition of two dtypes loads number by number: on an H200 it reaches half of what memory
gives. Import it only where Triton is: the names of a kernel are globals of its module.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # numbers that a program adds: 16 a thread, loaded as vectors


@triton.jit
def _wide_add(total, narrow, numel, BLOCK: tl.constexpr) -> None:
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    # What was added is not read again soon; the sum may stay in the cache.
    added = tl.load(narrow + offsets, mask=inside, eviction_policy='evict_first')
    before = tl.load(total + offsets, mask=inside)
    tl.store(total + offsets, before + added.to(before.dtype), mask=inside)


def wide_add_(total: Tensor, narrow: Tensor) -> Tensor:
    """`total += narrow`.

    Args:
        total: On a GPU, contiguous; changed in place.
        narrow: Contiguous, of the same shape and device, in a dtype whose numbers that of `total`
            holds.

    Returns:
        `total`.

    Raises:
        ValueError: If shapes differ or a tensor is not contiguous.
    """
    if total.shape != narrow.shape:
        raise ValueError(f'shapes differ: {list(total.shape)} and {list(narrow.shape)}')
    if not (total.is_contiguous() and narrow.is_contiguous()):
        raise ValueError(f'strides {total.stride()} and {narrow.stride()}: expected contiguous')
    numel = total.numel()
    if numel:
        _wide_add[(triton.cdiv(numel, _BLOCK),)](total, narrow, numel, BLOCK=_BLOCK, num_warps=8)
    return total
