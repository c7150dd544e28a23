"""Rotary position embedding, https://arxiv.org/abs/2104.09864, with the half-split layout."""

import torch
from torch import Tensor


def rope_table(position_ids: Tensor, head_dim: int, theta: float) -> Tensor:
    """Cosines and sines of the angle of every position, made once per forward.

    They are computed, not kept in a buffer: a model that is built on the meta device then has
    nothing but parameters to fill, and casting a model to half precision cannot round the angles.

    Args:
        position_ids: Position of each token in its document, [rows, seq].
        head_dim: Width of one head; even.
        theta: Base of the wavelengths.

    Returns:
        Cosines, then sines, [2, rows, seq, head_dim // 2], float32.
    """
    exponent = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    frequency = 1.0 / theta ** (exponent / head_dim)
    angle = position_ids.unsqueeze(-1).float() * frequency
    return torch.stack((angle.cos(), angle.sin()))


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate channel i of each head together with channel i + head_dim // 2.

    Args:
        x: Queries or keys, [rows, seq, heads, head_dim].
        rope: From `rope_table`, [2, rows, seq, head_dim // 2]. Its dtype is the dtype of the
            arithmetic: float32 unless a caller cast it.

    Returns:
        [rows, seq, heads, head_dim] in the dtype of `x`.
    """
    cos, sin = rope.unsqueeze(-2).unbind(0)
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)
