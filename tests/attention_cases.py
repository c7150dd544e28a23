"""Packed rows, and attention computed one document at a time in float64."""

import math

import torch

from internlm_mm.structures import Batch

LENGTHS = [[5, 1, 10], [16], [3, 13]]  # three rows of 16 tokens


def packed_batch(lengths=LENGTHS, max_docs=4):
    seq = sum(lengths[0])
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    document_ids = torch.stack(
        [torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in lengths]
    )
    cu_seqlens = torch.full((len(lengths), max_docs + 1), seq, dtype=torch.int32)
    for row, sizes in enumerate(lengths):
        cu_seqlens[row, : len(sizes)] = torch.tensor([sum(sizes[:i]) for i in range(len(sizes))])
    ids = torch.zeros(len(lengths), seq, dtype=torch.int64)
    return Batch(
        input_ids=ids,
        labels=ids,
        position_ids=position_ids,
        document_ids=document_ids.int(),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(map(max, lengths)),
        num_targets=ids.numel(),
    )


def oracle(q, k, v, lengths):
    """Token by token: no mask, no batching, float64."""
    groups = q.shape[2] // k.shape[2]
    out = torch.zeros_like(q, dtype=torch.float64)
    for row, sizes in enumerate(lengths):
        start = 0
        for size in sizes:
            for t in range(start, start + size):
                for head in range(q.shape[2]):
                    keys = k[row, start : t + 1, head // groups].double()
                    values = v[row, start : t + 1, head // groups].double()
                    scores = keys @ q[row, t, head].double() / math.sqrt(q.shape[3])
                    out[row, t, head] = scores.softmax(0) @ values
            start += size
    return out


def qkv(heads=4, kv_heads=4, rows=3, seq=16):
    return [torch.randn(rows, seq, h, 8, requires_grad=True) for h in (heads, kv_heads, kv_heads)]
