"""One matrix product where several linear layers read the same input.

Parameters stay apart, so that checkpoints, optimizers and names know nothing of it: their weights
are laid together whenever they are used, which copies them once in forward and once in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial, Shard

from internlm_mm.parallel.data import layers_of


def fuse_linears(model: nn.Module) -> int:
    """Let every module of the layers that has the seam `project` compute one product in it.

    Args:
        model: Changed in place; its linear layers may be split by tensor parallelism already.

    Returns:
        How many modules.

    Raises:
        ValueError: If the model has no such module.
    """
    chosen = [m for layer in layers_of(model) for m in layer.modules() if hasattr(m, 'project')]
    if not chosen:
        raise ValueError(
            f'strategy.kernels.fuse=True: no layer of {type(model).__name__} has the seam `project`'
        )
    for module in chosen:
        module.project = project_at_once  # type: ignore[assignment]
    return len(chosen)


def project_at_once(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """As `internlm_mm.ops.project`, by one matrix product.

    Args:
        x: [..., hidden]; with tensor parallelism the same on every rank.
        layers: Plain linear layers; with tensor parallelism each split by its rows.

    Returns:
        Each layer's output, views of one tensor; with tensor parallelism this rank's part of it.

    Raises:
        ValueError: If a layer is not a plain linear one, or some have biases and others have not.
    """
    linears = [_check(layer) for layer in layers]
    weights = [_part(layer.weight) for layer in linears]
    biases = [_part(layer.bias) for layer in linears if layer.bias is not None]
    if biases and len(biases) < len(linears):
        raise ValueError('strategy.kernels.fuse=True: all or none of fused layers have biases')
    if isinstance(x, DTensor):
        # Each rank has its columns' share of the gradient.
        x = x.to_local(grad_placements=[Partial()] * x.device_mesh.ndim)
    out = _Projected.apply(x, torch.cat(biases) if biases else None, *weights)
    return out.split([weight.shape[0] for weight in weights], -1)


def _check(layer: nn.Module) -> nn.Linear:
    if type(layer) is not nn.Linear:
        raise ValueError(
            f'strategy.kernels.fuse=True: {type(layer).__name__} is not a plain nn.Linear, whose '
            'product could be one with others'
        )
    return layer


def _part(parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter
    assert all(placement == Shard(0) for placement in parameter.placements)
    return parameter.to_local()


class _Projected(torch.autograd.Function):
    """Keeps the weights and not what they are laid together to, which would be a second copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        return F.linear(x, torch.cat(weights), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        need_x, need_bias, *need_weights = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        grad_x = (grad @ torch.cat(weights)) if need_x else None
        grad_bias = rows.sum(0) if need_bias else None
        grad_weights: list[Tensor | None] = [None] * len(weights)
        if any(need_weights):
            whole = rows.T @ x.flatten(0, -2)
            parts = whole.split([weight.shape[0] for weight in weights])
            grad_weights = [
                part if needed else None for part, needed in zip(parts, need_weights, strict=True)
            ]
        return grad_x, grad_bias, *grad_weights
