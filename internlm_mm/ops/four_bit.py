"""Frozen weights in 4 bits, through bitsandbytes.

Every 64 numbers of a weight share a scale, and each is one of sixteen values that are the quantiles
of a normal distribution (NF4, https://arxiv.org/abs/2305.14314, section 3). What is multiplied with
is made from that anew each time, in forward and in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from internlm_mm.ops.needs import Needs

BLOCK = 64
"""Numbers that share a scale."""

FOUR_BIT = Needs(module='bitsandbytes', install="pip install 'internlm_mm[qlora]'")


class FourBitWeight(NamedTuple):
    """A weight of a linear layer in 4 bits.

    Attributes:
        packed: Two numbers a byte, uint8 [numbers / 2, 1].
        scales: Of each block, float32 [numbers / 64].
        shape: Of the weight, (out, in).
    """

    packed: Tensor
    scales: Tensor
    shape: tuple[int, int]

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The weight, [out, in]."""
        return torch.ops.bitsandbytes.dequantize_4bit(
            self.packed, self.scales, BLOCK, 'nf4', self.shape, dtype
        )

    def multiply(self, x: Tensor) -> Tensor:
        """`x @ weight.T`. x: [..., in]; result: [..., out]."""
        return four_bit_product(x, self.packed, self.scales, self.shape)


def to_four_bit(weight: Tensor) -> FourBitWeight:
    """Round a weight to 4 bits. weight: [out, in], of a multiple of 64 numbers."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.detach().contiguous(), blocksize=BLOCK, quant_type='nf4')
    out, into = weight.shape
    return FourBitWeight(packed, state.absmax.float(), (out, into))


# Operations of their own, so that a compiler does not see the whole weight: it would notice that
# forward and backward make the same one, and keep it in between, which is 12 GiB for a 7B model.


@torch.library.custom_op('internlm_mm::four_bit_product', mutates_args=())
def four_bit_product(x: Tensor, packed: Tensor, scales: Tensor, shape: Sequence[int]) -> Tensor:
    """`x @ weight.T`; the weight stays in 4 bits for backward, and has no gradient.

    Args:
        x: [..., in].
        packed: See `FourBitWeight`, as the others.
        scales: Likewise.
        shape: (out, in).

    Returns:
        [..., out].
    """
    return x @ _weight(packed, scales, shape).whole(x.dtype).T


@four_bit_product.register_fake
def _(x: Tensor, packed: Tensor, scales: Tensor, shape: Sequence[int]) -> Tensor:  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], shape[0])


@torch.library.custom_op('internlm_mm::four_bit_gradient', mutates_args=())
def four_bit_gradient(grad: Tensor, packed: Tensor, scales: Tensor, shape: Sequence[int]) -> Tensor:
    """`grad @ weight`: of the product's input. grad: [..., out]; result: [..., in]."""
    return grad @ _weight(packed, scales, shape).whole(grad.dtype)


@four_bit_gradient.register_fake
def _(grad: Tensor, packed: Tensor, scales: Tensor, shape: Sequence[int]) -> Tensor:  # noqa: ARG001
    return grad.new_empty(*grad.shape[:-1], shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    _, packed, scales, ctx.shape = inputs
    ctx.save_for_backward(packed, scales)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    packed, scales = ctx.saved_tensors
    return four_bit_gradient(grad, packed, scales, ctx.shape), None, None, None


four_bit_product.register_autograd(_backward, setup_context=_setup)


def _weight(packed: Tensor, scales: Tensor, shape: Sequence[int]) -> FourBitWeight:
    return FourBitWeight(packed, scales, (shape[0], shape[1]))
