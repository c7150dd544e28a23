"""Llama, second generation in style: no biases, key heads may be shared."""

from __future__ import annotations

from typing import Any

from torch import nn

from internlm_mm.models.decoder import DecoderLayer, check_sizes
from internlm_mm.models.init import NormalInit
from internlm_mm.models.layers import SelfAttention, SwiGLU
from internlm_mm.models.llama_format import LlamaFormat
from internlm_mm.registry import MODELS


@MODELS.register_module()
class Llama(LlamaFormat):
    """Llama without biases and with an untied head; grouped-query attention if asked for.

    Matrices are drawn with standard deviation 0.02, norms are 1. Scaled rotary frequencies
    (Llama 3.1 and later) are not part of this family.

    Args:
        vocab_size: Rows of the embedding table, padding rows included.
        hidden_size: Width of the residual stream.
        intermediate_size: Inner width of the feed-forward layers.
        num_layers: Layers.
        num_heads: Query heads.
        num_kv_heads: Key/value heads; must divide `num_heads`, and equals it if None.
        head_dim: Width of one head; `hidden_size // num_heads` if None.
        max_seq_len: Longest sequence, in tokens.
        rope_theta: Base of the rotary wavelengths.
        norm_eps: Added to the mean square in every norm.
        objective: What training sums, as a module or its config; next-token loss if None.

    Raises:
        ValueError: If sizes do not fit together.

    Source: https://arxiv.org/abs/2307.09288, section 2.2.
    """

    init = NormalInit(embedding=0.02, projection=0.02, scale_by_depth=False)
    attention_bias = False

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        max_seq_len: int = 4096,
        rope_theta: float = 10_000.0,
        norm_eps: float = 1e-5,
        objective: dict[str, Any] | nn.Module | None = None,
    ) -> None:
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_sizes(num_heads=num_heads, num_kv_heads=kv_heads, num_layers=num_layers)
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(f'num_heads={num_heads} does not divide hidden_size={hidden_size}')
        width = hidden_size // num_heads if head_dim is None else head_dim
        super().__init__(
            lambda: DecoderLayer(
                SelfAttention(hidden_size, num_heads, kv_heads, width, bias=False),
                SwiGLU(hidden_size, intermediate_size),
                hidden_size,
                norm_eps,
            ),
            num_layers=num_layers,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_heads=num_heads,
            num_kv_heads=kv_heads,
            head_dim=width,
            max_seq_len=max_seq_len,
            rope_theta=rope_theta,
            norm_eps=norm_eps,
            objective=objective,
        )
