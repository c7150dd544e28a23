"""Which attention backends run here, which one 'auto' takes, why, and how fast they are."""

from typing import Any

import torch

from internlm_mm.ops.attention import Attend
from internlm_mm.ops.attention_choice import choose_attention
from internlm_mm.ops.attention_trial import (
    document_lengths,
    draw_inputs,
    make_rows,
    try_attention,
)
from internlm_mm.registry import ATTENTIONS
from internlm_mm.utils.rates import repeat_for

# rows, sequence, heads, head dimension
_SIZES = {'cuda': (2, 4096, 32, 128), 'cpu': (1, 512, 4, 64)}


def examine_attentions(
    device: torch.device, dtype: torch.dtype, seconds: float
) -> dict[str, dict[str, Any]]:
    """Try every registered backend on dense and on packed rows.

    Args:
        device: Where.
        dtype: Of queries, keys and values.
        seconds: How long each is timed; 0 tries without timing.

    Returns:
        By backend and then 'dense' and 'packed': `works`, `why` not, and `forward_tflops` and
        `both_tflops` (with the backward pass), attention counted causally inside documents.
        'auto' has `choice` and `why` instead.
    """
    found: dict[str, dict[str, Any]] = {'auto': {}}
    for rows in ('dense', 'packed'):
        choice, why = choose_attention('auto', device, dtype, packed=rows == 'packed')
        found['auto'][rows] = {'choice': choice, 'why': why}
    for name in sorted(ATTENTIONS.module_dict):
        found[name] = {
            rows: _examine(name, device, dtype, rows == 'packed', seconds)
            for rows in ('dense', 'packed')
        }
    return found


def _examine(
    name: str, device: torch.device, dtype: torch.dtype, packed: bool, seconds: float
) -> dict[str, Any]:
    try:
        choose_attention(name, device, dtype, packed)
        attend = ATTENTIONS.get(name)
        try_attention(attend, device, dtype, packed)
        rates = _rates(attend, device, dtype, packed, seconds) if seconds else {}
    except (ValueError, RuntimeError, ImportError, NotImplementedError) as error:
        return {'works': False, 'why': str(error).partition('\n')[0]}
    return {'works': True, **rates}


def _rates(
    attend: Attend, device: torch.device, dtype: torch.dtype, packed: bool, seconds: float
) -> dict[str, float]:
    rows, seq, heads, width = sizes = _SIZES.get(device.type, _SIZES['cpu'])
    q, k, v = draw_inputs(sizes, device, dtype)
    documents = make_rows(rows, seq, device) if packed else None
    gradient = torch.randn_like(q)
    lengths = document_lengths(seq) if packed else [seq]
    # Two products of n^2 d multiplications, of which a causal model needs half.
    forward = 2.0 * rows * heads * width * sum(length**2 for length in lengths)

    @torch.no_grad()
    def once() -> None:
        attend(q, k, v, documents)

    def both() -> None:
        torch.autograd.grad(attend(q, k, v, documents), (q, k, v), gradient)

    return {
        'forward_tflops': forward / repeat_for(once, seconds, device) / 1e12,
        # Backward has five products to forward's two.
        'both_tflops': 3.5 * forward / repeat_for(both, seconds, device) / 1e12,
    }
