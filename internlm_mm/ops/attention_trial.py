"""A backend's results and gradients on a few numbers, beside the reference's."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from internlm_mm.ops.attention import Attend, Documents, reference_attention
from internlm_mm.registry import ATTENTIONS

_ROWS, _SEQ, _HEADS = 2, 200, 4  # more than one block of any kernel, and parts of one
_HEAD_DIM = 64
_DOCUMENTS = 8  # of a packed row
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}  # of the largest value
_HALF_TOLERANCE = 3e-2  # halves have 8 bits or more


@cache  # a kernel that is compiled when it first runs takes some seconds
def fault_of(
    name: str, device: torch.device, dtype: torch.dtype, packed: bool, head_dim: int | None
) -> str | None:
    """What is wrong with a backend on this machine, as a predicate of its name; None for nothing.

    Args:
        name: A name in ATTENTIONS that nothing is known against.
        device: Where it would run.
        dtype: Of queries, keys and values.
        packed: Whether rows hold several documents.
        head_dim: Width of a head, where that is known.
    """
    try:
        with warnings.catch_warnings():  # of its compiler; no fault, where warnings are errors
            warnings.simplefilter('ignore')
            try_attention(ATTENTIONS.get(name), device, dtype, packed, head_dim)
    except Exception as error:  # whatever a package of others raises
        told = str(error).strip().partition('\n')[0]
        return f'fails here: {told or type(error).__name__}'
    return None


def try_attention(
    attend: Attend,
    device: torch.device,
    dtype: torch.dtype,
    packed: bool,
    head_dim: int | None = None,
) -> None:
    """Compare a small case with the reference.

    Args:
        attend: The backend.
        device: Where it runs.
        dtype: Of queries, keys and values.
        packed: Whether rows hold several documents.
        head_dim: Width of a head; 64 if not known.

    Raises:
        RuntimeError: If they differ by more than the precision explains, or the backend fails.
    """
    with torch.inference_mode(False), torch.enable_grad():
        _compare(attend, device, dtype, packed, head_dim or _HEAD_DIM)


def _compare(
    attend: Attend, device: torch.device, dtype: torch.dtype, packed: bool, head_dim: int
) -> None:
    q, k, v = draw_inputs((_ROWS, _SEQ, _HEADS, head_dim), device, dtype)
    documents = make_rows(_ROWS, _SEQ, device) if packed else None
    precise = torch.promote_types(dtype, torch.float32)
    wide = [x.detach().to(precise).requires_grad_() for x in (q, k, v)]
    expected = reference_attention(wide[0], wide[1], wide[2], documents)
    out = attend(q, k, v, documents)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    found = torch.autograd.grad(out, (q, k, v), gradient)
    gradients = torch.autograd.grad(expected, wide, gradient.to(precise))
    for name, here, there in zip(
        ('result', 'gradient of q', 'gradient of k', 'gradient of v'),
        (out, *found),
        (expected, *gradients),
        strict=True,
    ):
        error = ((here.to(precise) - there).abs().max() / there.abs().max()).item()
        if not error <= _TOLERANCE.get(dtype, _HALF_TOLERANCE):
            raise RuntimeError(f'its {name} is {error:.1e} off the reference')


def draw_inputs(
    sizes: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Queries, keys and values of `sizes`: rows, sequence, heads, head dimension."""
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
