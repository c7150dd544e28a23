"""FlashAttention-4 (the package `flash-attn-4`) as operations of torch.

As such they have a shape function and a gradient of their own, so that a compiled layer goes
through them in one graph. The package is imported when they first run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from internlm_mm.ops.attention import Documents, register_attention
from internlm_mm.ops.needs import Needs

# Of widths that are rounded up to a multiple of 16 which is none of 32 the gradients are wrong, by
# as much as they are long: of queries always, and where heads share keys, of keys and values, too
# (4.0.0b36 on sm_90, 8 to 128 channels; 24 and multiples of 32 are right).
NEEDS = Needs(
    module='flash_attn.cute.interface',
    install="pip install 'internlm_mm[flash4]'",
    cuda=True,
    half=True,
    capability=(9, 0),
    head_dim=128,
    head_dim_multiple=32,
)


@register_attention('flash4', mask=False, needs=NEEDS)
def flash4_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    """FlashAttention-4: dense rows, or documents laid end to end, which need no mask.

    CUDA, Hopper or newer, half precision. Arguments as `reference_attention`.

    Source: https://github.com/Dao-AILab/flash-attention, flash_attn/cute.
    """
    if documents is None:
        return flash4_forward(q, k, v, None, 0)[0]
    ends, longest = documents.cu_seqlens, documents.max_seqlen
    flat = (x.flatten(0, 1) for x in (q, k, v))
    return flash4_forward(*flat, ends, longest)[0].unflatten(0, q.shape[:2])


@torch.library.custom_op('internlm_mm::flash4_forward', mutates_args=())
def flash4_forward(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor | None, longest: int
) -> tuple[Tensor, Tensor]:
    """Causal attention and the logarithm of its normaliser.

    Args:
        q: [rows, seq, heads, head_dim], or [tokens, heads, head_dim] with `ends`.
        k: Likewise, with as many heads or a divisor of that.
        v: Like `k`.
        ends: Starts of all documents in `tokens`, then that total, int32; None for dense rows.
        longest: Tokens in the longest document; not read without `ends`.

    Returns:
        What queries get, like `q`; float32 [rows, heads, seq] or [heads, tokens].
    """
    from flash_attn.cute.interface import _flash_attn_fwd

    found = _flash_attn_fwd(q, k, v, causal=True, return_lse=True, **_boundaries(ends, longest))
    return found[0].contiguous(), found[1].contiguous()


@flash4_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,  # noqa: ARG001  the operation's signature
    v: Tensor,  # noqa: ARG001
    ends: Tensor | None,
    longest: int,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    assert (ends is None) == (len(shape) == 3), 'documents are laid end to end, rows are not'
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op('internlm_mm::flash4_backward', mutates_args=())
def flash4_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    normaliser: Tensor,
    ends: Tensor | None,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values; arguments and results of `flash4_forward`."""
    from flash_attn.cute.interface import _flash_attn_bwd

    found = _flash_attn_bwd(
        q, k, v, out, grad.contiguous(), normaliser, causal=True, **_boundaries(ends, longest)
    )
    grad_q, grad_k, grad_v = (x.contiguous() for x in found[:3])
    return grad_q, grad_k, grad_v


@flash4_backward.register_fake
def _(
    grad: Tensor,  # noqa: ARG001  the operation's signature
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,  # noqa: ARG001
    normaliser: Tensor,  # noqa: ARG001
    ends: Tensor | None,  # noqa: ARG001
    longest: int,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _boundaries(ends: Tensor | None, longest: int) -> dict[str, Any]:
    if ends is None:
        return {}
    return {
        'cu_seqlens_q': ends,
        'cu_seqlens_k': ends,
        'max_seqlen_q': longest,
        'max_seqlen_k': longest,
    }


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ends, longest = inputs
    ctx.save_for_backward(q, k, v, *output, ends)
    ctx.longest = longest
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    q, k, v, out, normaliser, ends = ctx.saved_tensors
    found = flash4_backward(grad, q, k, v, out, normaliser, ends, ctx.longest)
    return *found, None, None


flash4_forward.register_autograd(_differentiate, setup_context=_keep)
