"""Logits -> their gradient, in place, in one kernel: for the loss on GPUs (Triton).

Import it only where Triton is: the names of a kernel are globals of its module.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192  # logits that a program holds at a time


@triton.jit
def _softmax_gradient(
    logits,
    targets,
    target_log_probs,
    stride,
    vocab_size: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    start = logits + row * stride
    columns = tl.arange(0, BLOCK)
    # Each lane goes through its own columns; lanes are put together once, behind the loop.
    largest = tl.full([BLOCK], -float('inf'), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for offset in range(0, vocab_size, BLOCK):
        inside = offset + columns < vocab_size
        values = tl.load(start + offset + columns, mask=inside, other=-float('inf')).to(tl.float32)
        higher = tl.maximum(largest, values)
        # A lane that has seen nothing yet would compare infinities.
        seen = higher > -float('inf')
        total = tl.where(seen, total * tl.exp(largest - higher) + tl.exp(values - higher), 0.0)
        largest = higher
    peak = tl.max(largest, 0)
    normaliser = peak + tl.log(tl.sum(total * tl.exp(largest - peak), 0))
    log_prob = tl.load(start + target).to(tl.float32) - normaliser
    tl.store(target_log_probs + row, log_prob)
    tl.debug_barrier()  # the target's logit is read before it is overwritten
    # Probability minus one, rounded only once.
    target_gradient = tl.exp(log_prob) - 1.0
    for offset in range(0, vocab_size, BLOCK):
        inside = offset + columns < vocab_size
        values = tl.load(start + offset + columns, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.exp(values - normaliser)
        gradient = tl.where(offset + columns == target, target_gradient, gradient)
        tl.store(start + offset + columns, gradient, mask=inside)


def softmax_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """Put the gradient of the summed cross-entropy in place of the logits.

    They are read twice and written once; sums are taken in float32.

    Args:
        logits: [tokens, vocab], rows contiguous; overwritten.
        targets: Index of the token to predict, [tokens], int64, each in range(vocab).

    Returns:
        Log-probability of each target, float32 [tokens].
    """
    if logits.stride(1) != 1:
        raise ValueError(f'rows of logits must be contiguous, but strides are {logits.stride()}')
    rows, vocab_size = logits.shape
    found = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _softmax_gradient[(rows,)](
        logits,
        targets.contiguous(),
        found,
        logits.stride(0),
        vocab_size,
        BLOCK=min(_BLOCK, triton.next_power_of_2(vocab_size)),
        num_warps=16,
    )
    return found
