"""A linear layer with a low-rank change of its weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from internlm_mm.ops.four_bit import FourBitWeight


class LowRank(NamedTuple):
    """A change of a weight by `scale * up @ down`.

    Attributes:
        down: [rank, in].
        up: [out, rank].
        scale: Factor of the change.
        dropout: Share of the inputs of the change that are zeroed; those of the weight are not.
        magnitude: How long each row of the changed weight is, [out], where that is learnt apart
            from directions; None leaves rows as long as they come out.
    """

    down: Tensor
    up: Tensor
    scale: float
    dropout: float = 0.0
    magnitude: Tensor | None = None


def low_rank_linear(
    x: Tensor,
    weight: Tensor | FourBitWeight,
    bias: Tensor | None,
    change: LowRank | None,
    add_up: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`x @ changed_weight.T + bias`, without making the changed weight.

    Args:
        x: [..., in].
        weight: [out, in], or that in 4 bits.
        bias: [out], or None.
        change: Of `weight`; None for none.
        add_up: Where all of these but `up` and `magnitude` are a part of the columns, in: adds up
            [out] over the parts. What is returned is then a part of a sum.

    Returns:
        [..., out].

    Source: LoRA, https://arxiv.org/abs/2106.09685, section 4.1; DoRA,
    https://arxiv.org/abs/2402.09353, section 4.
    """
    if change is None:
        return _linear(x, weight, bias)
    given = F.dropout(x, change.dropout) if change.dropout else x
    changed = F.linear(F.linear(given, change.down) * change.scale, change.up)
    if change.magnitude is None:
        return _linear(x, weight, bias) + changed
    norms = row_norms(weight, change, add_up)
    factor = change.magnitude / norms.to(change.magnitude.dtype)
    if change.dropout:
        product = _linear(x, weight) + (factor - 1) * _linear(given, weight)
        out = product + factor * changed
    else:
        out = factor * (_linear(x, weight) + changed)
    return out if bias is None else out + bias


def _linear(x: Tensor, weight: Tensor | FourBitWeight, bias: Tensor | None = None) -> Tensor:
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    out = weight.multiply(x)
    return out if bias is None else out + bias


@torch.no_grad()
def row_norms(
    weight: Tensor | FourBitWeight,
    change: LowRank | None = None,
    add_up: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """How long the rows of a changed weight come out; a constant for gradients.

    Args:
        weight: [out, in], or that in 4 bits.
        change: Of `weight`; None for none.
        add_up: As in `low_rank_linear`.

    Returns:
        [out], in float32 at least.

    Source: that it is a constant, https://arxiv.org/abs/2402.09353, section 4.3.
    """
    if isinstance(weight, FourBitWeight):
        weight = weight.whole(torch.float32)
    wide = torch.promote_types(weight.dtype, torch.float32)
    whole = weight.to(wide)
    if change is not None:
        whole = whole + change.scale * (change.up.to(wide) @ change.down.to(wide))
    squares = whole.square().sum(1)
    return (squares if add_up is None else add_up(squares)).sqrt()


def merge_low_rank(weight: Tensor, change: LowRank) -> Tensor:
    """The changed weight itself, in float32 at least. weight, result: [out, in]."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    merged = weight.to(wide) + change.scale * (change.up.to(wide) @ change.down.to(wide))
    if change.magnitude is None:
        return merged
    return merged * (change.magnitude.to(wide) / row_norms(weight, change)).unsqueeze(1)
