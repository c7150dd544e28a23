"""Products that add the gradient of a weight to what earlier micro-batches left.

Autograd hands out each micro-batch's gradient by itself, in the dtype of the weight, and somebody
adds it up in a wider one: a pass over memory that computes nothing else. Here the matrix product
adds to the sum itself, in the sum's dtype, and nothing is rounded in between.

Whoever keeps the sums says how they are found, by `find_sums_with`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class GradientSum(Protocol):
    """Where the gradient of one weight adds up."""

    @property
    def dtype(self) -> torch.dtype:
        """In what it adds up."""

    def get(self) -> Tensor | None:
        """The sum so far, to be added to in place; None before there is anything."""

    def put(self, total: Tensor) -> None:
        """Take over what the sum begins with."""


Finder = Callable[[Tensor], GradientSum | None]

_FINDERS: WeakSet[Finder] = WeakSet()


def find_sums_with(finder: Finder) -> None:
    """Ask `finder` for the sums of weights.

    Args:
        finder: Told a tensor over the memory of a weight, gives its sum; None for what it does not
            know. It is asked for as long as somebody else keeps it.
    """
    _FINDERS.add(finder)


def find_sum(weight: Tensor) -> GradientSum | None:
    """The sum that belongs to a weight, or None where gradients are handed out as usual."""
    for finder in tuple(_FINDERS):
        found = finder(weight)
        if found is not None:
            return found
    return None


def add_product(total: Tensor | None, left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """`total + left.T @ right`, in place.

    Args:
        total: [n, m], in `wide`; None for zeros.
        left: [tokens, n].
        right: [tokens, m], in the dtype of `left`.
        wide: What is computed and added in; the dtype of `left`, or a wider one.

    Returns:
        `total`, or a new tensor.
    """
    narrow = left.dtype in (torch.bfloat16, torch.float16)
    if narrow and wide == torch.float32 and left.is_cuda:  # what torch.mm can widen
        # Not to fill a new sum with zeros first is a pass over it less.
        if total is None:
            return torch.mm(left.T, right, out_dtype=wide)
        return torch.addmm(total, left.T, right, out_dtype=wide, out=total)
    left, right = left.to(wide), right.to(wide)
    return left.T @ right if total is None else total.addmm_(left.T, right)


def add_scaled(into: GradientSum, gradient: Tensor, scale: Tensor) -> None:
    """Add `gradient * scale`.

    Args:
        into: To what.
        gradient: Like the weight, in any dtype; overwritten.
        scale: [].
    """
    total = into.get()
    if total is None:
        into.put(gradient.mul_(scale).to(into.dtype))
    elif total.dtype == gradient.dtype:
        total.addcmul_(gradient, scale)
    else:
        total.add_(gradient.mul_(scale))


class AddingLinear(nn.Linear):
    """A linear layer whose weight's gradient goes to the sum that is found for it.

    Layers become such by a change of their class: with a `forward` of its own each layer of a model
    would be another program to the compiler.

    Attributes:
        gradient_anchor: [1], requires a gradient; one for all layers.
    """

    gradient_anchor: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`. x: [..., in]."""
        if not torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        # Of the weight itself there is no gradient: autograd would allocate and add one.
        return _AddingLinear.apply(x, self.weight.detach(), self.bias, self.gradient_anchor)


class _AddingLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, _: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_x = (rows @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        anchor = add_weight_gradient(rows, x.flatten(0, -2), weight)
        return grad_x, None, grad_bias, anchor


@torch.library.custom_op('internlm_mm::add_weight_gradient', mutates_args=())
def add_weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Add `grad.T @ x` to the sum of a weight.

    That is an effect which a compiler is not told of: what it would be told of is a tensor that is
    there before forward, so that sums would take memory while they hold nothing. What keeps the
    call in a compiled graph is that its result is the gradient of something (without elements it
    would be left out).

    Args:
        grad: Gradient of the layer's output, [tokens, out].
        x: Its input, [tokens, in].
        weight: [out, in]; only its memory's identity is read.

    Returns:
        The gradient of an anchor, 0, [1].

    Raises:
        RuntimeError: If there is no sum for this weight.
    """
    into = find_sum(weight)
    if into is None:
        raise RuntimeError(f'no sum was found for the gradient of a weight {list(weight.shape)}')
    total = into.get()
    found = add_product(total, grad, x, into.dtype)
    if total is None:
        into.put(found)
    return grad.new_zeros(1)


@add_weight_gradient.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG001  the operation's signature
    return grad.new_zeros(1)
