"""Which token a model finds likeliest, without the logits of all tokens at once."""

from __future__ import annotations

import torch
from torch import Tensor

from internlm_mm.ops.cross_entropy import VocabularyShard
from internlm_mm.utils.loss_chunk import loss_chunk


@torch.no_grad()
def greedy_tokens(
    hidden: Tensor, weight: Tensor, chunk: int | None = None, shard: VocabularyShard | None = None
) -> Tensor:
    """The likeliest next token after each position; of equal ones the first.

    Args:
        hidden: What the head reads, [tokens, hidden].
        weight: The head, [vocab, hidden], or the part of it that `shard` tells of.
        chunk: Tokens whose logits are held at a time; None as `loss_chunk` says.
        shard: Which rows of the head `weight` holds, where processes share the vocabulary; None
            for all of them. Two small collectives a chunk stand for the whole logits.

    Returns:
        [tokens], int64.
    """
    chunk = loss_chunk(chunk, in_place=False)
    found = torch.empty(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        best, tokens = (hidden[part] @ weight.T).max(1)
        if shard is not None:
            best = best.to(torch.promote_types(best.dtype, torch.float32))  # for any backend
            own = best.clone()
            # Those with the best score of all take part, and the smallest token of them wins.
            best = shard.max_over_shards(best)
            tokens = torch.where(own == best, tokens + shard.start, shard.vocab_size)
            tokens = -shard.max_over_shards(-tokens)
        found[part] = tokens
    return found
