"""The language-model head and its loss in one, without the logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from internlm_mm.ops.gradient_sum import add_product, add_scaled, find_sum
from internlm_mm.structures import IGNORE_INDEX
from internlm_mm.utils.loss_chunk import loss_chunk


class VocabularyShard(NamedTuple):
    """The part of the vocabulary whose rows of the head this process holds.

    Attributes:
        start: First token of the part.
        vocab_size: Tokens in all.
        sum_over_shards: Adds up a tensor over the processes that share the vocabulary, in place.
        max_over_shards: The largest of each element over them, in place.
    """

    start: int
    vocab_size: int
    sum_over_shards: Callable[[Tensor], Tensor]
    max_over_shards: Callable[[Tensor], Tensor]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of `hidden @ weight.T`, chunk by chunk over the tokens.

    Gradients are computed in forward, while a chunk's logits are at hand, and scaled in backward;
    the most that is held of logits is `chunk * vocab`, which on a GPU their gradient replaces in
    place. Logits are normalised, and the gradient of
    `weight` accumulated, in float32 also where the inputs are half precision (float64 in float64).

    Args:
        hidden: What the head reads, [tokens, hidden].
        weight: The head, [vocab, hidden].
        labels: Token to predict, `IGNORE_INDEX` where none, [tokens], int64.
        label_smoothing: Share of the target spread evenly over the vocabulary, in [0, 1), as in
            `torch.nn.functional.cross_entropy`.
        chunk: Tokens whose logits are held at a time; None as `loss_chunk` says.
        shard: Which rows of the head `weight` holds, where processes share the vocabulary; None
            for all of them. Two small collectives a chunk stand for the whole logits. Losses are
            those of the whole vocabulary; the gradient of `hidden` is this shard's part of a sum.

    Returns:
        The sum over labelled tokens, float32 [], and each token's loss, 0 where it is ignored,
        float32 [tokens], detached.

    Source: losses over a split vocabulary, https://arxiv.org/abs/1909.08053, section 3.
    """
    if not torch.is_grad_enabled():  # which a function of autograd cannot tell from inside
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, labels, label_smoothing, chunk, shard)


def linear_token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk: int | None = None,
    shard: VocabularyShard | None = None,
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T` of every token, for losses that are no plain sum of it.

    As `linear_cross_entropy`, but what a token's loss weighs may depend on all of them, and is
    known only in backward. Where `weight` has a gradient, logits are therefore computed once more
    there, chunk by chunk; where it has none, as under adapters, they are not.

    Args:
        hidden: See `linear_cross_entropy`, and so are the others.
        weight: See there.
        labels: See there.
        chunk: See there.
        shard: See there.

    Returns:
        The loss of each token, 0 where it is ignored, float32 [tokens], differentiable.
    """
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    chunk = loss_chunk(chunk, in_place=False)
    return _LinearTokenLosses.apply(hidden, weight, labels, chunk, shard)


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
        chunk: int | None,
        shard: VocabularyShard | None,
    ) -> tuple[Tensor, Tensor]:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = None
        in_place = _gradient_kernel(hidden, label_smoothing, shard) if need_hidden else None
        chunk = loss_chunk(chunk, in_place is not None)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            rows = hidden[part]
            ignored = labels[part] == IGNORE_INDEX
            target = labels[part].masked_fill(ignored, 0).unsqueeze(1)
            logits = rows @ weight.T
            if in_place is not None:
                losses[part] = -in_place(logits, target.squeeze(1))
                grad_logits = logits
            else:
                scores = (
                    _score(logits, target, wide, label_smoothing)
                    if shard is None
                    else _score_shard(logits, target, wide, shard)
                )
                losses[part] = _losses(scores, label_smoothing)
                if need_hidden or need_weight:
                    grad_logits = _grad_logits(scores, label_smoothing, hidden.dtype)
                del scores
            del logits  # or they would lie beside the next chunk's
            losses[part].masked_fill_(ignored, 0.0)
            if not (need_hidden or need_weight):
                continue
            # Ignored tokens are taken out here, where rows are short, and not in the logits.
            hide = ignored.unsqueeze(1)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part]).masked_fill_(hide, 0.0)
            if need_weight:
                grad_weight = add_product(
                    grad_weight, grad_logits, rows.masked_fill(hide, 0.0), wide
                )
            del grad_logits
        if need_weight and grad_weight is None:  # there are no tokens
            grad_weight = torch.zeros_like(weight, dtype=wide)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.weight_sum = find_sum(weight) if need_weight else None
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = torch.mul(grad_hidden, grad_sum, out=torch.empty_like(grad_hidden))
        if ctx.weight_sum is not None:
            add_scaled(ctx.weight_sum, grad_weight, grad_sum)
            grad_weight = None
        elif grad_weight is not None:
            scaled = torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
            grad_weight = torch.mul(grad_weight, grad_sum, out=scaled)
        return grad_hidden, grad_weight, None, None, None, None


class _LinearTokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk: int,
        shard: VocabularyShard | None,
    ) -> Tensor:
        need_hidden, ctx.need_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
        # Of the tokens' plain sum; backward has only to weigh its rows.
        grad_hidden = torch.empty_like(hidden) if need_hidden and not ctx.need_weight else None
        for part, ignored, scores in _chunks(hidden, weight, labels, chunk, shard):
            losses[part] = _losses(scores, 0.0).masked_fill_(ignored, 0.0)
            if grad_hidden is not None:
                grad_logits = _grad_logits(scores, 0.0, hidden.dtype)
                torch.mm(grad_logits, weight, out=grad_hidden[part])
                grad_hidden[part].masked_fill_(ignored.unsqueeze(1), 0.0)
        ctx.chunk, ctx.shard = chunk, shard
        if ctx.need_weight:
            ctx.save_for_backward(hidden, weight, labels)
        else:
            ctx.save_for_backward(grad_hidden)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.need_weight:
            (grad_hidden,) = ctx.saved_tensors
            if grad_hidden is not None:
                out = torch.empty_like(grad_hidden)
                grad_hidden = torch.mul(grad_hidden, grad_losses.unsqueeze(1), out=out)
            return grad_hidden, None, None, None, None
        hidden, weight, labels = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = None
        for part, ignored, scores in _chunks(hidden, weight, labels, ctx.chunk, ctx.shard):
            shares = grad_losses[part].masked_fill(ignored, 0.0).unsqueeze(1)
            grad_logits = _grad_logits(scores, 0.0, hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
                torch.mul(grad_hidden[part], shares, out=grad_hidden[part])
            weighed = (hidden[part] * shares).to(hidden.dtype)
            grad_weight = add_product(grad_weight, grad_logits, weighed, grad_losses.dtype)
        if grad_weight is None:  # there are no tokens
            grad_weight = torch.zeros_like(weight)
        into = find_sum(weight)
        if into is not None:
            add_scaled(into, grad_weight, grad_weight.new_ones(()))
            return grad_hidden, None, None, None, None
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _chunks(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, shard: VocabularyShard | None
) -> Iterator[tuple[slice, Tensor, _Scores]]:
    """Chunk by chunk, which tokens it has, whether each is ignored, and its scores."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        ignored = labels[part] == IGNORE_INDEX
        target = labels[part].masked_fill(ignored, 0).unsqueeze(1)
        logits = hidden[part] @ weight.T
        if shard is None:
            yield part, ignored, _score(logits, target, wide, 0.0)
        else:
            yield part, ignored, _score_shard(logits, target, wide, shard)


class _Scores(NamedTuple):
    """A chunk's log-probabilities, over all tokens or over a shard's.

    Attributes:
        log_probs: Of the tokens held here, [tokens, vocab or shard].
        target: Index of the target among them, [tokens, 1]; any valid one where it is elsewhere.
        is_here: True where the target is held here, [tokens, 1]; None if all are.
        target_log_probs: [tokens, 1].
        mean_log_probs: Over the whole vocabulary, [tokens], for label smoothing; else None.
        vocab_size: Tokens in all.
    """

    log_probs: Tensor
    target: Tensor
    is_here: Tensor | None
    target_log_probs: Tensor
    mean_log_probs: Tensor | None
    vocab_size: int


def _score(logits: Tensor, target: Tensor, wide: torch.dtype, label_smoothing: float) -> _Scores:
    log_probs = F.log_softmax(logits, dim=-1, dtype=wide)
    mean = log_probs.mean(1) if label_smoothing else None
    return _Scores(log_probs, target, None, log_probs.gather(1, target), mean, logits.shape[1])


def _score_shard(
    logits: Tensor, target: Tensor, wide: torch.dtype, shard: VocabularyShard
) -> _Scores:
    logits = logits.to(wide)
    logits -= shard.max_over_shards(logits.amax(1, keepdim=True))
    local = target - shard.start
    is_here = (local >= 0) & (local < logits.shape[1])
    local = local.clamp(0, logits.shape[1] - 1)
    target_logits = logits.gather(1, local).masked_fill(~is_here, 0.0)
    parts = (logits.exp().sum(1, keepdim=True), target_logits, logits.sum(1, keepdim=True))
    total, target_logits, sum_logits = shard.sum_over_shards(torch.cat(parts, 1)).split(1, dim=1)
    normaliser = total.log()
    mean = (sum_logits / shard.vocab_size - normaliser).squeeze(1)
    return _Scores(
        logits - normaliser, local, is_here, target_logits - normaliser, mean, shard.vocab_size
    )


def _losses(scores: _Scores, label_smoothing: float) -> Tensor:
    """Loss of each token, [tokens]."""
    losses = -scores.target_log_probs.squeeze(1)
    if label_smoothing:
        assert scores.mean_log_probs is not None
        losses = torch.lerp(losses, -scores.mean_log_probs, label_smoothing)
    return losses


def _grad_logits(scores: _Scores, label_smoothing: float, dtype: torch.dtype) -> Tensor:
    """Gradient of the summed loss in the logits held here; overwrites the log-probabilities."""
    share = label_smoothing / scores.vocab_size
    log_probs = scores.log_probs
    # Probability minus target cancels where the model is sure: there it is rounded only once.
    target_grad = scores.target_log_probs.exp() - (1.0 - label_smoothing + share)
    if label_smoothing:
        grad = log_probs.exp_().sub_(share).to(dtype)
    else:
        same = log_probs.dtype == dtype
        grad = torch.exp(
            log_probs, out=log_probs if same else torch.empty_like(log_probs, dtype=dtype)
        )
    target_grad = target_grad.to(dtype)
    if scores.is_here is not None:
        target_grad = torch.where(scores.is_here, target_grad, grad.gather(1, scores.target))
    return grad.scatter_(1, scores.target, target_grad)


def _gradient_kernel(
    hidden: Tensor, label_smoothing: float, shard: VocabularyShard | None
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """What puts gradients in the place of logits here, if anything does."""
    if not hidden.is_cuda or label_smoothing or shard is not None or hidden.dtype == torch.float64:
        return None
    return softmax_gradient_kernel()


@cache
def softmax_gradient_kernel() -> Callable[[Tensor, Tensor], Tensor] | None:
    """The kernel, where Triton is installed, as it is beside every torch for CUDA."""
    try:
        from internlm_mm.ops.softmax_gradient import softmax_gradient_
    except ImportError:
        return None
    return softmax_gradient_
