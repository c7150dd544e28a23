"""InternLM, first generation (7B and 20B)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from internlm_mm.models.decoder import DecoderLayer, check_sizes
from internlm_mm.models.init import NormalInit
from internlm_mm.models.layers import SelfAttention, SwiGLU
from internlm_mm.models.llama_format import LlamaFormat
from internlm_mm.registry import MODELS


@MODELS.register_module()
class InternLM(LlamaFormat):
    """InternLM v1: multi-head attention with biases on q, k, v and o, SwiGLU, an untied head.

    Initialisation. Embedding and head are drawn with standard deviation 0.0052; q, k, v, gate and
    up projections with 0.006; o and down projections of layer i, counted from 0, with
    0.006 / sqrt(2 * (i + 1)); biases are 0 and norms 1. The first releases of InternLM scaled the
    *up* projection by depth and drew the down projection with a flat 0.0015, because a rename had
    exchanged the two; that is not reproduced, and later releases do as is done here. Kept as they
    were: the scale follows a layer's own depth and not the number of layers. Nor are the rotary
    frequencies stored or rounded to half precision, as they were at first.

    Args:
        vocab_size: Rows of the embedding table, padding rows included.
        hidden_size: Width of the residual stream.
        intermediate_size: Inner width of the feed-forward layers.
        num_layers: Layers.
        num_heads: Attention heads; must divide `hidden_size`.
        max_seq_len: Longest sequence, in tokens.
        rope_theta: Base of the rotary wavelengths.
        norm_eps: Added to the mean square in every norm.
        objective: What training sums, as a module or its config; next-token loss if None.

    Raises:
        ValueError: If sizes do not fit together.
    """

    init = NormalInit(embedding=0.0052, projection=0.006, scale_by_depth=True)
    attention_bias = True

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_layers: int,
        num_heads: int,
        max_seq_len: int = 2048,
        rope_theta: float = 10_000.0,
        norm_eps: float = 1e-5,
        objective: dict[str, Any] | nn.Module | None = None,
    ) -> None:
        check_sizes(hidden_size=hidden_size, num_heads=num_heads)
        if hidden_size % num_heads:
            raise ValueError(f'num_heads={num_heads} does not divide hidden_size={hidden_size}')
        head_dim = hidden_size // num_heads
        super().__init__(
            lambda: DecoderLayer(
                SelfAttention(hidden_size, num_heads, num_heads, head_dim, bias=True),
                SwiGLU(hidden_size, intermediate_size),
                hidden_size,
                norm_eps,
            ),
            num_layers=num_layers,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            max_seq_len=max_seq_len,
            rope_theta=rope_theta,
            norm_eps=norm_eps,
            objective=objective,
        )

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """As in `LlamaFormat`; heads must not share keys, nor have a width of their own."""
        sizes = super().from_hf_config(config)
        heads, kv_heads = sizes['num_heads'], sizes.pop('num_kv_heads')
        if kv_heads != heads:
            raise ValueError(f'InternLM has num_key_value_heads={heads}, not {kv_heads}')
        head_dim = sizes.pop('head_dim')
        if head_dim * heads != sizes['hidden_size']:
            raise ValueError(f'InternLM has head_dim=hidden_size / heads, not {head_dim}')
        return sizes
