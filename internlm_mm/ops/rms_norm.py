"""Root-mean-square normalisation."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide each vector by its root mean square and scale it, https://arxiv.org/abs/1910.07467.

    The statistics are taken in float32 or wider and the result is cast back before the scale is
    applied, the order of Hugging Face's Llama, so that an exported model rounds where this does.

    Args:
        x: [..., hidden], of any floating dtype.
        weight: Scale of each channel, [hidden].
        eps: Added to the mean square.

    Returns:
        [..., hidden] in the dtype of `x`, where `weight` has it too.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)
