"""Scores of whole documents, as of reward models."""

import torch
from torch import Tensor


def document_scores(hidden: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Product of a vector with what the last layer says at each document's last token.

    It is computed in float32 at least.

    Args:
        hidden: [rows, seq, hidden].
        weight: [1, hidden].
        cu_seqlens: Where documents begin, and the last one ends, [rows, max_docs + 1].

    Returns:
        [rows, max_docs]; anything for documents of no length.
    """
    ends = (cu_seqlens[:, 1:].long() - 1).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
    last = hidden.gather(1, ends)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (last.to(wide) * weight.to(wide)).sum(-1)
