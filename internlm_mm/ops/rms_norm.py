"""Root-mean-square normalisation."""

from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from internlm_mm.ops.needs import Needs
from internlm_mm.registry import NORMS
from internlm_mm.utils.apex import import_apex, missing_apex


@NORMS.register_module(name='torch')
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


@NORMS.register_module(name='fused')
def fused_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Torch's own kernel, which scales before it rounds. Arguments as `rms_norm`."""
    return F.rms_norm(x, weight.shape, weight, eps)


@NORMS.register_module(name='liger')
def liger_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Liger's kernel, which rounds as `rms_norm` does. CUDA; arguments as `rms_norm`."""
    from liger_kernel.transformers import functional

    # In place it would overwrite the gradient, which the residual stream needs as well.
    return functional.liger_rms_norm(x, weight, eps, in_place=False)


@NORMS.register_module(name='apex')
def apex_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The kernel of NVIDIA's apex. CUDA; arguments as `rms_norm`."""
    return _apex_normalization().fused_layer_norm.fused_rms_norm_affine(
        x, weight, weight.shape, eps
    )


@cache
def _apex_normalization() -> Any:
    return import_apex('normalization', "strategy.kernels.norm='apex'")


LIGER = Needs(
    module='liger_kernel.transformers', install="pip install 'internlm_mm[liger]'", cuda=True
)
liger_rms_norm.needs = LIGER
apex_rms_norm.needs = Needs(cuda=True)
apex_rms_norm.missing = partial(missing_apex, 'normalization')
