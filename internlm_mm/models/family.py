"""What families have in common: sizes, checked, and layers of attention and SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from internlm_mm.models.decoder import Decoder, DecoderLayer, check_sizes
from internlm_mm.models.hf_forms import HFForm
from internlm_mm.models.layers import SelfAttention, SwiGLU


class Family(Decoder):
    """A decoder of self-attention and SwiGLU layers, as every family here is.

    A family says which biases and norms its attention has, how weights are drawn (`init`), and
    which forms it has in Hugging Face folders (`hf_forms`, its own first).

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
        attention_bias: Whether the projections to queries, keys and values have biases.
        output_bias: Whether the projection of attention's result has one.
        qk_norm: Whether each head's queries and keys are normalised.

    Raises:
        ValueError: If sizes do not fit together.
    """

    hf_forms: ClassVar[tuple[HFForm, ...]]
    attention_bias: bool = False
    """Whether queries, keys and values have biases; on the class, what holds by default."""
    output_bias: bool = False
    qk_norm: bool = False

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        max_seq_len: int,
        rope_theta: float,
        rope_scaling: Mapping[str, Any] | None,
        norm_eps: float,
        tie_word_embeddings: bool,
        objective: dict[str, Any] | nn.Module | None,
        attention_bias: bool,
        output_bias: bool,
        qk_norm: bool = False,
    ) -> None:
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_sizes(hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=kv_heads)
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(f'num_heads={num_heads} does not divide hidden_size={hidden_size}')
        width = hidden_size // num_heads if head_dim is None else head_dim
        super().__init__(
            lambda: DecoderLayer(
                SelfAttention(
                    hidden_size,
                    num_heads,
                    kv_heads,
                    width,
                    bias=attention_bias,
                    output_bias=output_bias,
                    norm_eps=norm_eps if qk_norm else None,
                ),
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
            rope_scaling=rope_scaling,
            norm_eps=norm_eps,
            tie_word_embeddings=tie_word_embeddings,
            objective=objective,
        )
        self.attention_bias = attention_bias
        self.output_bias = output_bias
        self.qk_norm = qk_norm
