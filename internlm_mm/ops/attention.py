"""Causal attention inside documents: one seam, several kernels behind it.

Every backend is a function `attend(q, k, v, documents)` in `[rows, seq, heads, head_dim]`,
registered in ATTENTIONS under the name that `strategy.attention` asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from internlm_mm.ops.needs import Needs
from internlm_mm.registry import ATTENTIONS
from internlm_mm.structures import Batch


class Documents(NamedTuple):
    """Where one document ends and the next begins, in the forms that backends ask for.

    Attributes:
        document_ids: Document of each token in its row, [rows, seq].
        cu_seqlens: Starts of all documents of all rows in the flattened `rows * seq` tokens, then
            that total, [rows * max_docs + 1], int32. Entries of zero length pad it.
        max_seqlen: Tokens in the longest document.
        mask: True where a query (third dimension) may see a key (fourth),
            [rows, 1, seq, seq], or None where no backend needs it.
    """

    document_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    mask: Tensor | None

    def lengths(self) -> Tensor:
        """How many tokens the document of each token has, [rows, seq], int32."""
        rows = self.document_ids.shape[0]
        lengths = self.cu_seqlens.diff().unflatten(0, (rows, -1))
        return lengths.gather(1, self.document_ids.long())


# torch 2.11 shares key heads unasked; later ones refuse unless asked to.
_VARLEN_OPTIONS: dict[str, Any] = (
    {'enable_gqa': True} if 'enable_gqa' in signature(varlen_attn).parameters else {}
)

# cuDNN spends a tenth of a second on a plan for every new length, and a cache grows every token.
_KERNELS_WITHOUT_PLANS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

# Torch's own kernels: Ampere or newer. FlashAttention-2 takes heads of up to 256 channels, cuDNN of
# 128 on every GPU and release, and neither takes a number that 8 does not divide.
_TORCH_KERNELS = Needs(cuda=True, half=True, capability=(8, 0), head_dim=256)

Attend = Callable[[Tensor, Tensor, Tensor, Documents | None], Tensor]


def make_documents(batch: Batch, need_mask: bool) -> Documents | None:
    """What attention has to know of a batch, made once per forward and shared by all layers.

    Args:
        batch: The micro-batch.
        need_mask: Whether to build the boolean mask, which takes `rows * seq * seq` bytes.

    Returns:
        None when each row is one document, which every backend serves without a mask.
    """
    if batch.cu_seqlens.shape[1] == 2:
        return None
    rows, seq = batch.document_ids.shape  # the whole row, also where its tokens are shared out
    offset = torch.arange(rows, device=batch.cu_seqlens.device, dtype=torch.int32) * seq
    starts = (batch.cu_seqlens[:, :-1] + offset.unsqueeze(1)).flatten()
    mask = None
    if need_mask:
        same = batch.document_ids.unsqueeze(2) == batch.document_ids.unsqueeze(1)
        mask = same.tril_().unsqueeze(1)
    return Documents(
        document_ids=batch.document_ids,
        cu_seqlens=F.pad(starts, (0, 1), value=rows * seq),
        max_seqlen=batch.max_seqlen,
        mask=mask,
    )


def needs_mask(attend: Attend) -> bool:
    """Whether `attend` reads `Documents.mask`; True unless it was registered otherwise."""
    return getattr(attend, 'needs_mask', True)


def register_attention(
    name: str, *, mask: bool, needs: Needs | None = None
) -> Callable[[Attend], Attend]:
    """Register a backend and note on it what it reads and needs.

    Args:
        name: What `strategy.attention` calls it.
        mask: Whether it reads `Documents.mask`.
        needs: What it asks of the machine; nothing if None.
    """

    def decorate(attend: Attend) -> Attend:
        attend.needs_mask = mask  # type: ignore[attr-defined]
        attend.needs = needs or Needs()  # type: ignore[attr-defined]
        return ATTENTIONS.register_module(name=name, module=attend)

    return decorate


@register_attention('reference', mask=True)
def reference_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    """Softmax attention written out, in float32 or wider: what other backends are tested against.

    Args:
        q: Queries, [rows, seq, heads, head_dim].
        k: Keys, [rows, seq, kv_heads, head_dim]; kv_heads divides heads.
        v: Values, like `k`.
        documents: Boundaries inside the rows; None when each row is one document.

    Returns:
        [rows, seq, heads, head_dim] in the dtype of `q`.
    """
    groups = q.shape[2] // k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.repeat_interleave(groups, dim=2).to(wide) for x in (k, v))
    scores = torch.einsum('bqhd,bkhd->bhqk', q.to(wide), k) * q.shape[-1] ** -0.5
    if documents is None:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    else:
        visible = _mask_of(documents)
    weights = scores.masked_fill(~visible, float('-inf')).softmax(-1)
    return torch.einsum('bhqk,bkhd->bqhd', weights, v).to(q.dtype)


@register_attention('sdpa', mask=True)
def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    """Scaled dot product, by whichever kernel torch picks. Arguments as `reference_attention`."""
    mask = None if documents is None else _mask_of(documents)
    return _sdpa(q, k, v, mask)


@register_attention('cudnn', mask=False, needs=replace(_TORCH_KERNELS, packed=False, head_dim=128))
def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    """The kernel of cuDNN, torch's fastest on dense rows. Arguments as `reference_attention`.

    Raises:
        ValueError: If the rows are packed, which this kernel cannot mask.
    """
    if documents is not None:
        raise ValueError("attention 'cudnn' takes one document a row; use 'varlen' for packed rows")
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q, k, v, None)


@register_attention('varlen', mask=False, needs=_TORCH_KERNELS)
def varlen_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    """FlashAttention over documents laid end to end: no mask, no work across boundaries.

    CUDA and half precision only. Arguments as `reference_attention`.
    """
    if documents is None:
        rows, seq = q.shape[:2]
        ends = torch.arange(rows + 1, device=q.device, dtype=torch.int32) * seq
        longest = seq
    else:
        ends, longest = documents.cu_seqlens, documents.max_seqlen
    return varlen_between(q, k, v, ends, ends, longest, longest)


def varlen_between(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    longest_query: int,
    longest_key: int,
) -> Tensor:
    """FlashAttention where queries and keys have boundaries of their own; causal from their ends.

    Args:
        q: Queries, [rows, tokens, heads, head_dim].
        k: Keys, [rows, seq, kv_heads, head_dim].
        v: Values, like `k`.
        query_ends: Starts of all segments in the flattened `rows * tokens` queries, then that
            total, int32.
        key_ends: The same for `rows * seq` keys; as many.
        longest_query: Queries in the longest segment, or more.
        longest_key: Keys in the longest segment, or more.

    Returns:
        [rows, tokens, heads, head_dim].
    """
    out = varlen_attn(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        query_ends,
        key_ends,
        longest_query,
        longest_key,
        window_size=(-1, 0),
        **_VARLEN_OPTIONS,
    )
    assert isinstance(out, Tensor)
    return out.unflatten(0, q.shape[:2])


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal FlashAttention through torch's scaled dot product, which torch may distribute."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _sdpa(q, k, v, None)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Scaled dot product where `mask` says which key (last dimension) a query may see."""
    return _sdpa(q, k, v, mask)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of new tokens to everything in a KV cache.

    Args:
        q: Queries of the new tokens, [rows, new, heads, head_dim].
        k: The cache's keys, [rows, length, kv_heads, head_dim].
        v: The cache's values, like `k`.
        mask: True where a query may see a slot, [rows, 1, new, length].

    Returns:
        [rows, new, heads, head_dim].
    """
    if q.is_cuda:
        with sdpa_kernel(_KERNELS_WITHOUT_PLANS):
            return _sdpa(q, k, v, mask)
    return _sdpa(q, k, v, mask)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _mask_of(documents: Documents) -> Tensor:
    assert documents.mask is not None, 'make_documents was called with need_mask=False'
    return documents.mask
