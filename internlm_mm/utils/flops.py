"""How much arithmetic a token costs, counted in the two ways that papers use."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class FlopsPerToken:
    """FLOPs of forward and backward for one token; recomputation is never counted.

    Attributes:
        full: Attention counted over the whole square, as Megatron's papers and InternLM do.
        causal: Only the half that a causal model computes.
    """

    full: float
    causal: float


def flops_per_token(
    matmul_parameters: int, num_layers: int, attention_width: int, seq_len: int
) -> FlopsPerToken:
    """6 FLOPs a parameter, and 12 (full) or 6 (causal) x layers x width x sequence for attention.

    Args:
        matmul_parameters: Parameters without the input embedding, which is a look-up.
        num_layers: Decoder layers.
        attention_width: Heads x head dimension.
        seq_len: Tokens in a row.

    Source: Narayanan et al., https://arxiv.org/abs/2104.04473, section 5.1 and appendix.
    """
    parameters = 6.0 * matmul_parameters
    attention = 6.0 * num_layers * attention_width * seq_len
    return FlopsPerToken(full=parameters + 2 * attention, causal=parameters + attention)


def model_flops(model: Any, seq_len: int) -> FlopsPerToken | None:
    """Arithmetic of a decoder with the usual attributes; None for other models."""
    if not all(
        hasattr(model, name) for name in ('layers', 'num_heads', 'head_dim', 'embed_tokens')
    ):
        return None
    total = sum(parameter.numel() for parameter in model.parameters())
    # A tied table is looked up, too, but it counts for the head.
    is_tied = getattr(model, 'tie_word_embeddings', False)
    return flops_per_token(
        matmul_parameters=total - (0 if is_tied else model.embed_tokens.weight.numel()),
        num_layers=len(model.layers),
        attention_width=model.num_heads * model.head_dim,
        seq_len=seq_len,
    )
