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
            ignored = labels[part] == IGNORE_INDEX
            target = labels[part].masked_fill(ignored, 0).unsqueeze(1)
            log_probs = F.log_softmax(rows @ weight.T, dim=-1, dtype=wide)
            target_log_probs = log_probs.gather(1, target)
            losses[part] = _losses(log_probs, target_log_probs, label_smoothing)
            losses[part].masked_fill_(ignored, 0.0)
            if not (need_hidden or need_weight):
                continue
            grad_logits = _grad_logits(
                log_probs, target, target_log_probs, label_smoothing, hidden.dtype
            )
            # Ignored tokens are taken out here, where rows are short, and not in the logits.
            hide = ignored.unsqueeze(1)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part]).masked_fill_(hide, 0.0)
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits, rows.masked_fill(hide, 0.0))
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = torch.mul(grad_hidden, grad_sum, out=torch.empty_like(grad_hidden))
        if grad_weight is not None:
            scaled = torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
            grad_weight = torch.mul(grad_weight, grad_sum, out=scaled)
        return grad_hidden, grad_weight, None, None, None


def _losses(log_probs: Tensor, target_log_probs: Tensor, label_smoothing: float) -> Tensor:
    """Loss of each token, [tokens]."""
    losses = -target_log_probs.squeeze(1)
    if label_smoothing:
        losses = torch.lerp(losses, -log_probs.mean(1), label_smoothing)
    return losses


def _grad_logits(
    log_probs: Tensor,
    target: Tensor,
    target_log_probs: Tensor,
    label_smoothing: float,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of the summed loss in the logits, [tokens, vocab]; overwrites `log_probs`."""
    share = label_smoothing / log_probs.shape[1]
    # Probability minus target cancels where the model is sure: there it is rounded only once.
    target_grad = target_log_probs.exp() - (1.0 - label_smoothing + share)
    if label_smoothing:
        grad = log_probs.exp_().sub_(share).to(dtype)
    else:
        same = log_probs.dtype == dtype
        grad = torch.exp(
            log_probs, out=log_probs if same else torch.empty_like(log_probs, dtype=dtype)
        )
    return grad.scatter_(1, target, target_grad.to(dtype))


def _add_product(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """`total += grad_logits.T @ hidden`, where `total` may be wider than the inputs."""
    if grad_logits.dtype == total.dtype:
        total.addmm_(grad_logits.T, hidden)
    elif total.is_cuda:
        torch.addmm(total, grad_logits.T, hidden, out_dtype=total.dtype, out=total)
    else:
        total += grad_logits.T @ hidden
