"""Activation recomputation: trade a second forward for memory."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from internlm_mm.parallel.data import layers_of


def recompute_layers(model: nn.Module, fraction: float) -> int:
    """Keep only the inputs of a share of the layers and compute the rest again in backward.

    Args:
        model: Layers are changed in place; names of parameters stay.
        fraction: Share of the layers, 0 to 1, the first ones, as InternLM's `checkpoint` does;
            rounded, but at least one where it is not 0: a pipeline stage may have only one.

    Returns:
        How many layers recompute.

    Raises:
        ValueError: If `fraction` is out of range, or the model has no layers to choose from.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f'strategy.recompute={fraction} must lie between 0 and 1')
    layers = list(layers_of(model))
    if fraction and not layers:
        raise ValueError(f'strategy.recompute={fraction}: {type(model).__name__} has no `layers`')
    chosen = layers[: max(round(len(layers) * fraction), fraction > 0)]
    for layer in chosen:
        # Replacing `forward` keeps the layer's name and its parameters' names, which a wrapper
        # would not.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return len(chosen)


def recomputed_layers(model: nn.Module) -> tuple[int, int]:
    """How many layers of a model recompute, and how many there are."""
    layers = list(layers_of(model))
    chosen = [isinstance(x.forward, partial) and x.forward.func is checkpoint for x in layers]
    return sum(chosen), len(layers)
