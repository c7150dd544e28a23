"""How much arithmetic a token costs, counted in the two ways that papers use."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class FlopsPerToken:
    """FLOPs of forward and backward for one token; recomputation is not in them.

    Attributes:
        full: Attention counted over the whole square, as Megatron's papers and InternLM do.
        causal: Only the half that a causal model computes.
        again_full: What is added where every layer is recomputed, attention counted in full.
        again_causal: Likewise, counted causally.
    """

    full: float
    causal: float
    again_full: float = 0.0
    again_causal: float = 0.0

    def with_recomputation(self, share: float) -> tuple[float, float]:
        """What the hardware computes if this share of the layers is recomputed: full, causal."""
        return self.full + share * self.again_full, self.causal + share * self.again_causal


def flops_per_token(
    matmul_parameters: int,
    num_layers: int,
    attention_width: int,
    seq_len: int,
    recomputed_parameters: int = 0,
) -> FlopsPerToken:
    """6 FLOPs a parameter, and 12 (full) or 6 (causal) x layers x width x sequence for attention.

    Args:
        matmul_parameters: Parameters without the input embedding, which is a look-up.
        num_layers: Decoder layers.
        attention_width: Heads x head dimension.
        seq_len: Tokens in a row.
        recomputed_parameters: Parameters used a second time where all layers are recomputed.

    Source: Narayanan et al., https://arxiv.org/abs/2104.04473, section 5.1 and appendix.
    """
    parameters = 6.0 * matmul_parameters
    attention = 6.0 * num_layers * attention_width * seq_len
    again = 2.0 * recomputed_parameters  # forward alone, a third of the whole
    return FlopsPerToken(
        full=parameters + 2 * attention,
        causal=parameters + attention,
        again_full=again + 2 * attention / 3,
        again_causal=again + attention / 3,
    )


def model_flops(model: Any, seq_len: int) -> FlopsPerToken | None:
    """Arithmetic of a decoder with the usual attributes; None for other models."""
    if not all(
        hasattr(model, name) for name in ('layers', 'num_heads', 'head_dim', 'embed_tokens')
    ):
        return None
    total = sum(parameter.numel() for parameter in model.parameters())
    # A tied table is looked up, too, but it counts for the head.
    is_tied = getattr(model, 'tie_word_embeddings', False)
    # Recomputing a layer stops before its last product, whose result backward does not need.
    recomputed = sum(
        parameter.numel()
        for name, parameter in model.layers.named_parameters()
        if not name.endswith('down_proj.weight')
    )
    return flops_per_token(
        matmul_parameters=total - (0 if is_tied else model.embed_tokens.weight.numel()),
        num_layers=len(model.layers),
        attention_width=model.num_heads * model.head_dim,
        seq_len=seq_len,
        recomputed_parameters=recomputed,
    )
