"""Which attention backends run here, which one 'auto' takes, why, and how fast they are."""

from typing import Any

import torch
from torch import Tensor

from internlm_mm.ops.attention import Attend, Documents, choose_attention, reference_attention
from internlm_mm.registry import ATTENTIONS
from internlm_mm.utils.rates import repeat_for

# rows, sequence, heads, head dimension
_SIZES = {'cuda': (2, 4096, 32, 128), 'cpu': (1, 512, 4, 64)}
_TRIAL = (2, 64, 4, 64)  # against the reference
_DOCUMENTS = 8  # of a packed row
_TOLERANCE = {torch.float32: 1e-4}  # of the largest value; halves have 8 bits or more
_HALF_TOLERANCE = 3e-2


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
        _try(attend, device, dtype, packed)
        rates = _rates(attend, device, dtype, packed, seconds) if seconds else {}
    except (ValueError, RuntimeError, ImportError, NotImplementedError) as error:
        return {'works': False, 'why': str(error).partition('\n')[0]}
    return {'works': True, **rates}


def _try(attend: Attend, device: torch.device, dtype: torch.dtype, packed: bool) -> None:
    """Compare a small case with the reference.

    Raises:
        RuntimeError: If they differ by more than the precision explains, or the backend fails.
    """
    q, k, v = _inputs(_TRIAL, device, dtype)
    documents = make_rows(_TRIAL[0], _TRIAL[1], device) if packed else None
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = reference_attention(wide[0], wide[1], wide[2], documents)
    out = attend(q, k, v, documents)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    found = torch.autograd.grad(out, (q, k, v), gradient)
    gradients = torch.autograd.grad(expected, wide, gradient.float())
    for name, here, there in zip(
        ('result', 'gradient of q', 'gradient of k', 'gradient of v'),
        (out, *found),
        (expected, *gradients),
        strict=True,
    ):
        error = ((here.float() - there).abs().max() / there.abs().max()).item()
        if not error <= _TOLERANCE.get(dtype, _HALF_TOLERANCE):
            raise RuntimeError(f'its {name} is {error:.1e} off the reference')


def _rates(
    attend: Attend, device: torch.device, dtype: torch.dtype, packed: bool, seconds: float
) -> dict[str, float]:
    rows, seq, heads, width = sizes = _SIZES.get(device.type, _SIZES['cpu'])
    q, k, v = _inputs(sizes, device, dtype)
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


def _inputs(
    sizes: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(sizes, generator=generator) for _ in 'qkv']
    return [x.to(device, dtype).requires_grad_() for x in drawn]


def document_lengths(seq: int) -> list[int]:
    """Lengths of the documents of a packed row: unequal, eight of them."""
    unit = seq // (_DOCUMENTS * (_DOCUMENTS + 1) // 2)
    lengths = [unit * (index + 1) for index in range(_DOCUMENTS - 1)]
    return [*lengths, seq - sum(lengths)]


def make_rows(rows: int, seq: int, device: torch.device) -> Documents:
    """Rows that are all packed with documents of `document_lengths`."""
    lengths = torch.tensor(document_lengths(seq))
    ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths).expand(rows, seq)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])[:-1]
    starts = (starts + torch.arange(rows).unsqueeze(1) * seq).flatten()
    ends = torch.cat([starts, torch.tensor([rows * seq])]).to(torch.int32)
    mask = (ids.unsqueeze(2) == ids.unsqueeze(1)).tril().unsqueeze(1)
    return Documents(
        document_ids=ids.to(device, torch.int32),
        cu_seqlens=ends.to(device),
        max_seqlen=int(lengths.max()),
        mask=mask.to(device),
    )
