"""The language-model head and its loss in one, without the logits of all tokens at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from internlm_mm.structures import IGNORE_INDEX


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of `hidden @ weight.T`, chunk by chunk over the tokens.

    Gradients are computed in forward, while a chunk's logits are at hand, and scaled in backward;
    the most that is held of logits is `chunk * vocab`. Logits are normalised, and the gradient of
    `weight` accumulated, in float32 also where the inputs are half precision (float64 in float64).

    Args:
        hidden: What the head reads, [tokens, hidden].
        weight: The head, [vocab, hidden].
        labels: Token to predict, `IGNORE_INDEX` where none, [tokens], int64.
        label_smoothing: Share of the target spread evenly over the vocabulary, in [0, 1), as in
            `torch.nn.functional.cross_entropy`.
        chunk: Tokens whose logits are held at a time.

    Returns:
        The sum over labelled tokens, float32 [], and each token's loss, 0 where it is ignored,
        float32 [tokens], detached.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, label_smoothing, chunk)


def reference_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The same with all logits at once and plain autograd, in the dtype of its inputs."""
    logits = hidden @ weight.T
    losses = F.cross_entropy(
        logits, labels, reduction='none', label_smoothing=label_smoothing, ignore_index=IGNORE_INDEX
    )
    return losses.sum(), losses.detach()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        label_smoothing: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            rows = hidden[part]
            losses[part], grad_logits = _chunk(
                rows, weight, labels[part], label_smoothing, need_hidden or need_weight
            )
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits, rows)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad_sum).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_sum).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def _chunk(
    hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """Losses [chunk] and, in the inputs' dtype, the gradient of the logits [chunk, vocab]."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    log_probs = F.log_softmax(hidden @ weight.T, dim=-1, dtype=wide)
    ignored = labels == IGNORE_INDEX
    target = labels.masked_fill(ignored, 0).unsqueeze(1)
    losses = -log_probs.gather(1, target).squeeze(1)
    if label_smoothing:
        losses = torch.lerp(losses, -log_probs.mean(1), label_smoothing)
    losses = losses.masked_fill_(ignored, 0.0)
    if not need_grad:
        return losses, log_probs
    grad = log_probs.exp_()
    if label_smoothing:
        grad -= label_smoothing / weight.shape[0]
    grad.scatter_add_(1, target, grad.new_full(target.shape, label_smoothing - 1.0))
    grad.masked_fill_(ignored.unsqueeze(1), 0.0)
    return losses, grad.to(hidden.dtype)


def _add_product(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """`total += grad_logits.T @ hidden`, in float32 whatever the inputs are."""
    if grad_logits.dtype == total.dtype:
        total.addmm_(grad_logits.T, hidden)
    else:
        total += grad_logits.T @ hidden
