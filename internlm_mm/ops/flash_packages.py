"""FlashAttention 2 and 3 from packages that a user has built or installed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from internlm_mm.ops.attention import Documents, register_attention
from internlm_mm.ops.needs import Needs

FLASH2 = Needs(
    module='flash_attn.flash_attn_interface',
    install='pip install flash-attn --no-build-isolation',
    cuda=True,
    half=True,
    capability=(8, 0),
    head_dim=256,
)
FLASH3 = Needs(
    module='flash_attn_interface',
    install='build it from https://github.com/Dao-AILab/flash-attention, folder hopper',
    cuda=True,
    half=True,
    majors=(9,),
    head_dim=256,
)


@register_attention('flash2', mask=False, needs=FLASH2)
def flash2_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    """FlashAttention-2 of the package `flash_attn`. Arguments as `reference_attention`.

    Torch has the same kernels built in: 'varlen' needs no package.
    """
    from flash_attn import flash_attn_interface

    return _attend(flash_attn_interface, q, k, v, documents)


@register_attention('flash3', mask=False, needs=FLASH3)
def flash3_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    """FlashAttention-3, for Hopper alone. Arguments as `reference_attention`."""
    import flash_attn_interface

    return _attend(flash_attn_interface, q, k, v, documents)


def _attend(module: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    if documents is None:
        return _result(module.flash_attn_func(q, k, v, causal=True))
    ends, longest = documents.cu_seqlens, documents.max_seqlen
    out = module.flash_attn_varlen_func(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        causal=True,
    )
    return _result(out).unflatten(0, q.shape[:2])


def _result(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Some releases of FlashAttention-3 return the normaliser, too."""
    return out[0] if isinstance(out, tuple) else out
