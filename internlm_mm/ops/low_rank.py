"""A linear layer with a low-rank change of its weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float,
    dropout: float = 0.0,
    magnitude: Tensor | None = None,
    norms: Tensor | None = None,
) -> Tensor:
    """`x @ (weight + scale * up @ down).T + bias`, without the sum of the matrices.

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out], or None.
        down: [rank, in].
        up: [out, rank].
        scale: Factor of the change.
        dropout: Share of the inputs of the change that are zeroed; those of `weight` are not.
        magnitude: The length of each row of the changed weight, [out], if lengths are learnt apart
            from directions; None leaves rows as long as they come out.
        norms: With `magnitude`, how long they come out, [out]; see `changed_row_norms`.

    Returns:
        [..., out].

    Source: LoRA, https://arxiv.org/abs/2106.09685, section 4.1; DoRA,
    https://arxiv.org/abs/2402.09353, section 4.
    """
    given = F.dropout(x, dropout) if dropout else x
    change = F.linear(F.linear(given, down) * scale, up)
    if magnitude is None:
        return F.linear(x, weight, bias) + change
    assert norms is not None, 'a magnitude needs the norms it stands in place of'
    factor = magnitude / norms.to(magnitude.dtype)
    if not dropout:
        product = F.linear(x, weight)
        out = factor * (product + change)
    else:
        out = F.linear(x, weight) + (factor - 1) * F.linear(given, weight) + factor * change
    return out if bias is None else out + bias


@torch.no_grad()
def changed_row_norms(
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float,
    add_up: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Length of each row of `weight + scale * up @ down`; a constant for gradients.

    Args:
        weight: [out, in].
        down: [rank, in].
        up: [out, rank].
        scale: Factor of the change.
        add_up: Where `weight` and `down` are a part of all columns: adds up [out] over the parts.

    Returns:
        [out], in float32 at least.

    Source: gradients are those of https://arxiv.org/abs/2402.09353, section 4.3.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    squares = (weight.to(wide) + scale * (up.to(wide) @ down.to(wide))).square().sum(1)
    return (squares if add_up is None else add_up(squares)).sqrt()
