"""Qwen3, dense: queries and keys are normalised, a head at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from internlm_mm.models.family import Family
from internlm_mm.models.hf_forms import QWEN3
from internlm_mm.models.init import NormalInit
from internlm_mm.registry import MODELS


@MODELS.register_module()
class Qwen3(Family):
    """Qwen3: grouped-query attention, q and k normalised before they are rotated; no biases.

    Each layer has two norms over `head_dim`, one that all query heads share and one for key heads.
    Matrices are drawn with standard deviation 0.02, biases are 0 and norms 1. Small models tie the
    head to the embedding. Sliding windows (`use_sliding_window`) are not done here.

    Args:
        vocab_size: Rows of the embedding table, padding rows included.
        hidden_size: Width of the residual stream.
        intermediate_size: Inner width of the feed-forward layers.
        num_layers: Layers.
        num_heads: Query heads.
        num_kv_heads: Key/value heads; must divide `num_heads`, and equals it if None.
        head_dim: Width of one head; `hidden_size // num_heads` if None.
        max_seq_len: Longest row, in tokens.
        rope_theta: Base of the rotary wavelengths.
        rope_scaling: How they are changed for longer sequences; see `Decoder`.
        norm_eps: Added to the mean square in every norm.
        attention_bias: Whether q, k, v and o have biases.
        tie_word_embeddings: Whether the head is the embedding table, turned round.
        objective: What training sums, as a module or its config; next-token loss if None.

    Raises:
        ValueError: If sizes do not fit together, or `rope_scaling` is not understood.

    Source: https://arxiv.org/abs/2505.09388, section 2.
    """

    init = NormalInit(embedding=0.02, projection=0.02, scale_by_depth=False)
    hf_forms = (QWEN3,)
    qk_norm = True
    tensor_plan = Family.tensor_plan | {'layers.*.self_attn.[qk]_norm': 'heads'}

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
        max_seq_len: int = 32_768,
        rope_theta: float = 1_000_000.0,
        rope_scaling: Mapping[str, Any] | None = None,
        norm_eps: float = 1e-6,
        attention_bias: bool = False,
        tie_word_embeddings: bool = False,
        objective: dict[str, Any] | nn.Module | None = None,
    ) -> None:
        super().__init__(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_seq_len=max_seq_len,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            norm_eps=norm_eps,
            tie_word_embeddings=tie_word_embeddings,
            objective=objective,
            attention_bias=attention_bias,
            output_bias=attention_bias,
            qk_norm=True,
        )
