"""How much arithmetic a token costs, counted in the two ways that papers use."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class FlopsPerToken:
    """FLOPs of forward and backward for one token; recomputation is not in them.

    A loss that compares with the model without its adapters, as DPO's, adds that forward.

    Attributes:
        full: Attention counted over the whole square, as Megatron's papers and InternLM do.
        causal: Only the half that a causal model computes.
        again_full: What is added where every layer is recomputed, attention counted in full.
        again_causal: Likewise, counted causally.
        trained_share: Share of the parameters that are trained. Of frozen ones no gradient is
            counted: 4 FLOPs a parameter and not 6, and 2 below the first layer that trains.
    """

    full: float
    causal: float
    again_full: float = 0.0
    again_causal: float = 0.0
    trained_share: float = 1.0

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
    flops = flops_per_token(
        matmul_parameters=total - (0 if is_tied else model.embed_tokens.weight.numel()),
        num_layers=len(model.layers),
        attention_width=model.num_heads * model.head_dim,
        seq_len=seq_len,
        recomputed_parameters=recomputed,
    )
    return _with_reference(model, _without_frozen(model, flops, seq_len), seq_len)


def _with_reference(model: Any, flops: FlopsPerToken, seq_len: int) -> FlopsPerToken:
    """What a loss adds that also asks the model without its adapters: a forward."""
    if not getattr(getattr(model, 'objective', None), 'reads_adapters_off', False):
        return flops
    frozen = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
        and (not name.startswith('embed_tokens.') or getattr(model, 'tie_word_embeddings', False))
    )
    attention = 2.0 * len(model.layers) * model.num_heads * model.head_dim * seq_len
    return replace(
        flops,
        full=flops.full + 2.0 * frozen + 2 * attention,
        causal=flops.causal + 2.0 * frozen + attention,
    )


def _without_frozen(model: Any, flops: FlopsPerToken, seq_len: int) -> FlopsPerToken:
    """What is left of a count where parameters are frozen."""
    counted = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not name.startswith('embed_tokens.') or getattr(model, 'tie_word_embeddings', False)
    }
    frozen = sum(p.numel() for p in counted.values() if not p.requires_grad)
    if not frozen:
        return flops
    spared = 2.0 * frozen  # gradients of weights
    attention = 0.0
    if not any(p.requires_grad for p in model.embed_tokens.parameters()):
        # Down to the first layer that trains something gradients of activations are wanted, and
        # not of what that one reads.
        for layer in model.layers.values():
            inside = dict(layer.named_parameters())
            trains = any(p.requires_grad for p in inside.values())
            spared += 2.0 * sum(p.numel() for n, p in inside.items() if not trains or _reads(n))
            if trains:
                break
            attention += 4.0 * model.num_heads * model.head_dim * seq_len
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return replace(
        flops,
        full=flops.full - spared - 2 * attention,
        causal=flops.causal - spared - attention,
        trained_share=trained / sum(p.numel() for p in model.parameters()),
    )


def _reads(name: str) -> bool:
    """Whether a matrix of a layer is multiplied with what the layer is given, normalised."""
    return name.startswith(tuple(f'self_attn.{x}_proj.' for x in 'qkv')) and '.lora_B.' not in name
