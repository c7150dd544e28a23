"""Puts the attention backend of the config, or the best one here, on every layer."""

import torch
from torch import Tensor, nn

from internlm_mm.ops.attention import Attend, Documents, choose_attention, needs_mask
from internlm_mm.registry import ATTENTIONS


def apply_attention(model: nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Set `attend` on every module that has one.

    'auto' may mean one backend for rows of one document and another for packed rows; which rows
    come is only known batch by batch.

    Args:
        model: Changed in place.
        name: A name in ATTENTIONS, or 'auto'.
        device: Where the model will run.
        dtype: What it computes in.

    Returns:
        What was chosen and why, for the log.
    """
    dense_name, reason = choose_attention(name, device, dtype, packed=False)
    attend = ATTENTIONS.get(dense_name)
    chosen = dense_name
    if name == 'auto':
        packed_name, packed_reason = choose_attention(name, device, dtype, packed=True)
        if packed_name != dense_name:
            attend = _by_rows(attend, ATTENTIONS.get(packed_name))
            chosen = f'{dense_name} ({reason}), packed rows {packed_name}'
            reason = packed_reason
    for module in model.modules():
        if hasattr(module, 'attend'):
            module.attend = attend
    return f'{chosen}: {reason}'


def _by_rows(dense: Attend, packed: Attend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        return (dense if documents is None else packed)(q, k, v, documents)

    attend.needs_mask = needs_mask(packed)  # type: ignore[attr-defined]
    return attend
