"""Frozen weights in 4 bits, through bitsandbytes.

Every 64 numbers of a weight share a scale, and each is one of sixteen values that are the quantiles
of a normal distribution (NF4, https://arxiv.org/abs/2305.14314, section 3). What is multiplied with
is made from that anew each time, in forward and in backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
        return _Product.apply(x, self.packed, self.scales, self.shape)


def to_four_bit(weight: Tensor) -> FourBitWeight:
    """Round a weight to 4 bits. weight: [out, in], of a multiple of 64 numbers."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.detach().contiguous(), blocksize=BLOCK, quant_type='nf4')
    out, into = weight.shape
    return FourBitWeight(packed, state.absmax.float(), (out, into))


class _Product(torch.autograd.Function):
    """Keeps the weight in 4 bits for backward; it has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: Tensor, scales: Tensor, shape: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(packed, scales)
        ctx.shape = shape
        return x @ FourBitWeight(packed, scales, shape).whole(x.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        packed, scales = ctx.saved_tensors
        return grad @ FourBitWeight(packed, scales, ctx.shape).whole(grad.dtype), None, None, None
