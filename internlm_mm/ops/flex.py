"""FlexAttention: torch generates the kernel, and blocks that nobody may see are skipped."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from internlm_mm.ops.attention import Documents, register_attention
from internlm_mm.ops.needs import Needs

BLOCK = 128
"""Queries, and keys, of which a block has so many."""


@register_attention('flex', mask=False, needs=Needs(cuda=True))
def flexible_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    """FlexAttention, causal inside documents. Arguments as `reference_attention`.

    CUDA, any precision. On a CPU torch has no backward for it, so it is not offered there; forward
    works.
    """
    rows, seq = q.shape[:2]
    if documents is None:
        ids = torch.zeros(1, seq, dtype=torch.int32, device=q.device).expand(rows, seq)
    else:
        ids = documents.document_ids
    out = _kernel(q.is_cuda)(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        block_mask=document_blocks(ids, whole_rows=documents is None),
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def document_blocks(document_ids: Tensor, whole_rows: bool = False) -> BlockMask:
    """Which blocks of keys each block of queries sees whole, in part or not at all.

    Documents lie one after the other, so the first and the last token of a block tell it all: this
    takes `(seq / BLOCK)^2` comparisons a row, where torch's `create_block_mask` takes `seq^2`.

    Args:
        document_ids: Document of each token in its row, rising, [rows, seq].
        whole_rows: Whether each row is one document, so that nobody need look.
    """
    seq = document_ids.shape[1]
    starts = torch.arange(0, seq, BLOCK, device=document_ids.device)
    ends = (starts + BLOCK).clamp(max=seq) - 1
    first, last = document_ids[:, starts], document_ids[:, ends]
    queries, keys = starts.unsqueeze(1), starts.unsqueeze(0)
    # A key's block ends in a document that the query's block has not left behind at its start.
    seen = (keys <= queries) & (last.unsqueeze(1) >= first.unsqueeze(2))
    whole = (keys < queries) & (first.unsqueeze(1) == last.unsqueeze(2))
    # The last block may be short. Its keys lie on the diagonal, seen in part; as torch does, so
    # are the keys that its queries see.
    whole &= (starts + BLOCK <= seq).unsqueeze(1)
    partly = seen & ~whole

    def is_before(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        return key <= query

    def is_before_in_document(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        return (key <= query) & (document_ids[row, key] == document_ids[row, query])

    return BlockMask.from_kv_blocks(
        *_in_order(partly),
        *_in_order(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=is_before if whole_rows else is_before_in_document,
        seq_lengths=(seq, seq),
    )


def _in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, and their indices, those first. blocks: [rows, n, n]."""
    numbers = blocks.to(torch.int32)
    order = numbers.argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return numbers.sum(-1, dtype=torch.int32).unsqueeze(1), order.unsqueeze(1).contiguous()


def _kernel(is_cuda: bool) -> Any:
    """A layer that is compiled compiles this with it; any other has it compiled by itself."""
    if torch.compiler.is_compiling() or not is_cuda:
        return flex_attention
    return _compiled()


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)
