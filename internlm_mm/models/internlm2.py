"""InternLM2: grouped key heads, no biases; packed projections on disk only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from internlm_mm.models.family import Family
from internlm_mm.models.hf_forms import INTERNLM2, LLAMA
from internlm_mm.models.init import NormalInit
from internlm_mm.registry import MODELS


@MODELS.register_module()
class InternLM2(Family):
    """InternLM2 and 2.5: grouped-query attention, by default without biases, an untied head.

    In memory its projections are apart, as in the other families; `INTERNLM2` is the form that
    packs them. Matrices are drawn with standard deviation 0.02, whatever their depth, as
    InternLM2 does; biases are 0 and norms 1.

    Args:
        vocab_size: Rows of the embedding table, padding rows included.
        hidden_size: Width of the residual stream.
        intermediate_size: Inner width of the feed-forward layers.
        num_layers: Layers.
        num_heads: Query heads.
        num_kv_heads: Key/value heads; must divide `num_heads`, and equals it if None.
        max_seq_len: Longest row, in tokens.
        rope_theta: Base of the rotary wavelengths.
        rope_scaling: How they are changed for longer sequences; see `Decoder`.
        norm_eps: Added to the mean square in every norm.
        attention_bias: Whether q, k, v and o have biases.
        objective: What training sums, as a module or its config; next-token loss if None.

    Raises:
        ValueError: If sizes do not fit together, or `rope_scaling` is not understood.

    Source: https://arxiv.org/abs/2403.17297, section 2.2.
    """

    init = NormalInit(embedding=0.02, projection=0.02, scale_by_depth=False)
    hf_forms = (LLAMA, INTERNLM2)

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        max_seq_len: int = 32_768,
        rope_theta: float = 1_000_000.0,
        rope_scaling: Mapping[str, Any] | None = None,
        norm_eps: float = 1e-5,
        attention_bias: bool = False,
        objective: dict[str, Any] | nn.Module | None = None,
    ) -> None:
        super().__init__(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
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
