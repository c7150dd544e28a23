"""The first InternLM: biases on all four projections of attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from internlm_mm.models.family import Family
from internlm_mm.models.hf_forms import INTERNLM, LLAMA
from internlm_mm.models.init import NormalInit
from internlm_mm.registry import MODELS


@MODELS.register_module()
class InternLM(Family):
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
        max_seq_len: Longest row, in tokens.
        rope_theta: Base of the rotary wavelengths.
        rope_scaling: How they are changed for longer sequences; see `Decoder`.
        norm_eps: Added to the mean square in every norm.
        attention_bias: Whether q, k, v and o have biases; published InternLM-20B has none.
        objective: What training sums, as a module or its config; next-token loss if None.

    Raises:
        ValueError: If sizes do not fit together, or `rope_scaling` is not understood.
    """

    init = NormalInit(embedding=0.0052, projection=0.006, scale_by_depth=True)
    hf_forms = (LLAMA, INTERNLM)
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
        rope_scaling: Mapping[str, Any] | None = None,
        norm_eps: float = 1e-5,
        attention_bias: bool = True,
        objective: dict[str, Any] | nn.Module | None = None,
    ) -> None:
        super().__init__(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=None,
            head_dim=None,
            max_seq_len=max_seq_len,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            norm_eps=norm_eps,
            tie_word_embeddings=False,
            objective=objective,
            attention_bias=attention_bias,
            output_bias=attention_bias,
        )
