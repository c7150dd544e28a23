"""Modules with the signatures of FlashAttention's packages, computing in plain torch on the CPU.

What of the arguments is given by name is a keyword of the real functions: flash-attn-4 4.0.0b36
(`flash_attn/cute/interface.py`), flash-attn 2.8 (`flash_attn/flash_attn_interface.py`) and
FlashAttention-3 (`hopper/flash_attn_interface.py`).
"""

import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch import Tensor

FLASH4_FORWARD = {'q', 'k', 'v', 'causal', 'return_lse'}
FLASH4_BACKWARD = {'q', 'k', 'v', 'out', 'dout', 'lse', 'causal'}
BOUNDARIES = {'cu_seqlens_q', 'cu_seqlens_k', 'max_seqlen_q', 'max_seqlen_k'}


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """One sequence each: [..., seq, heads, dim] -> the same and [..., heads, seq]."""
    groups = q.shape[-2] // k.shape[-2]
    k, v = (x.repeat_interleave(groups, -2) for x in (k, v))
    scores = torch.einsum('...qhd,...khd->...hqk', q, k) * q.shape[-1] ** -0.5
    if causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(ahead, float('-inf'))
    out = torch.einsum('...hqk,...khd->...qhd', scores.softmax(-1), v)
    return out, scores.logsumexp(-1)


def _forward(q, k, v, causal, ends, longest):
    if ends is None:
        return _attend(q, k, v, causal)
    bounds = ends.tolist()
    assert bounds == sorted(bounds) and bounds[-1] == len(q) and ends.dtype == torch.int32
    assert longest >= max(b - a for a, b in pairwise(bounds))
    parts = [_attend(q[a:b], k[a:b], v[a:b], causal) for a, b in pairwise(bounds) if b > a]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], -1)


def _flash_attn_fwd(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    softmax_scale=None,
    causal=False,
    return_lse=False,
):
    assert cu_seqlens_q is cu_seqlens_k and return_lse
    out, lse = _forward(q, k, v, causal, cu_seqlens_q, max_seqlen_q)
    return out, lse.float(), None, None, None


def _flash_attn_bwd(
    q,
    k,
    v,
    out,
    dout,
    lse,
    softmax_scale=None,
    causal=False,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
):
    assert causal and cu_seqlens_q is cu_seqlens_k
    if cu_seqlens_q is None:
        return _differentiate(q, k, v, out, dout, lse)
    bounds = cu_seqlens_q.tolist()
    parts = [
        _differentiate(*(x[a:b] for x in (q, k, v, out, dout)), lse[:, a:b])
        for a, b in pairwise(bounds)
        if b > a
    ]
    return tuple(torch.cat(gradients) for gradients in zip(*parts, strict=True))


def _differentiate(q, k, v, out, grad, lse):
    """By hand from what was saved, as the kernels do; below autograd there is no other way."""
    groups, scale = q.shape[-2] // k.shape[-2], q.shape[-1] ** -0.5
    keys, values = (x.repeat_interleave(groups, -2) for x in (k, v))
    scores = torch.einsum('...qhd,...khd->...hqk', q, keys) * scale
    weights = (scores - lse.unsqueeze(-1)).exp().tril()
    towards = torch.einsum('...qhd,...khd->...hqk', grad, values)
    own = (grad * out).sum(-1).transpose(-1, -2).unsqueeze(-1)
    through = weights * (towards - own) * scale
    grad_k = torch.einsum('...hqk,...qhd->...khd', through, q)
    grad_v = torch.einsum('...hqk,...qhd->...khd', weights, grad)
    return (
        torch.einsum('...hqk,...khd->...qhd', through, keys),
        *(x.unflatten(-2, (-1, groups)).sum(-2) for x in (grad_k, grad_v)),
    )


def _dense(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    return _forward(q, k, v, causal, None, 0)[0]


def _packed(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
):
    return _forward(q, k, v, causal, cu_seqlens_q, max_seqlen_q)[0]


def _with_normaliser(function):
    return lambda *args, **options: (function(*args, **options), None)


def install(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Put a stand-in where `package` would be: flash2, flash3 or flash4."""
    module = ModuleType('stand_in')
    if package == 'flash4':
        module._flash_attn_fwd, module._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd
        names = ['flash_attn', 'flash_attn.cute', 'flash_attn.cute.interface']
    else:
        wrap = _with_normaliser if package == 'flash3' else (lambda function: function)
        module.flash_attn_func, module.flash_attn_varlen_func = wrap(_dense), wrap(_packed)
        names = ['flash_attn', 'flash_attn.flash_attn_interface']
        if package == 'flash3':
            names = ['flash_attn_interface']
    for name in names[:-1]:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, names[-1], module)
    if len(names) > 1:
        setattr(sys.modules[names[-2]], names[-1].rpartition('.')[2], module)
