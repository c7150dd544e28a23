"""Mistral, dense, with attention to the whole document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from internlm_mm.models.family import Family
from internlm_mm.models.hf_forms import LLAMA, MISTRAL
from internlm_mm.models.init import NormalInit
from internlm_mm.registry import MODELS


@MODELS.register_module()
class Mistral(Family):
    """Mistral 7B from v0.2 on: grouped-query attention, no biases; a Llama under another name.

    The first release let a token see the last 4096 only (`sliding_window`), which is not done here.
    Matrices are drawn with standard deviation 0.02, norms are 1.

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
        tie_word_embeddings: Whether the head is the embedding table, turned round.
        objective: What training sums, as a module or its config; next-token loss if None.

    Raises:
        ValueError: If sizes do not fit together, or `rope_scaling` is not understood.

    Source: https://arxiv.org/abs/2310.06825, section 2.
    """

    init = NormalInit(embedding=0.02, projection=0.02, scale_by_depth=False)
    hf_forms = (MISTRAL, LLAMA)

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
        norm_eps: float = 1e-5,
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
            attention_bias=False,
            output_bias=False,
        )
