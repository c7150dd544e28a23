"""Activation recomputation: trade a second forward for memory."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from internlm_mm.parallel.data import layers_of
from internlm_mm.utils.suggest import did_you_mean

SELECTIVE = 'selective'

_KEPT = (
    'aten::mm',
    'aten::addmm',
    'aten::_scaled_mm',
    'aten::_scaled_dot_product_flash_attention',
    'aten::_scaled_dot_product_flash_attention_for_cpu',
    'aten::_scaled_dot_product_efficient_attention',
    'aten::_scaled_dot_product_cudnn_attention',
    'torch_attn::_varlen_attn',
    'internlm_mm::flash4_forward',
    'internlm_mm::four_bit_product',
)
"""What costs most to compute again: matrix products of weights, and attention as a kernel."""


def check_recompute(recompute: Any) -> float | str | None:
    """A share of the layers, 'selective', or `dict(budget_gib=NUMBER)`.

    Returns:
        What layers are told; None for a budget, from which the share is yet to follow.

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(recompute, Mapping):
        for key in recompute:
            if key != 'budget_gib':
                raise ValueError(
                    f'strategy.recompute.{key}={recompute[key]!r} is unknown.'
                    f'{did_you_mean(key, ("budget_gib",))}'
                )
        budget = recompute.get('budget_gib')
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0:
            raise ValueError(
                f'strategy.recompute.budget_gib={budget!r}: expected GiB of device memory, as 60'
            )
        return None
    if isinstance(recompute, str):
        if recompute != SELECTIVE:
            raise ValueError(
                f'strategy.recompute={recompute!r}: expected a share of the layers from 0 to 1, '
                f'dict(budget_gib=...) or a word.{did_you_mean(recompute, (SELECTIVE,))}'
            )
    elif not 0 <= recompute <= 1:
        raise ValueError(f'strategy.recompute={recompute} must lie between 0 and 1')
    return recompute


def recompute_layers(
    model: nn.Module, recompute: float | str | Mapping[str, Any], compiled: bool = False
) -> int:
    """Keep little of some layers and compute the rest again in backward.

    Args:
        model: Layers are changed in place; names of parameters stay.
        recompute: Share of the layers, 0 to 1, which keep only their inputs: the first ones, as
            InternLM's `checkpoint` does; rounded, but at least one where it is not 0: a pipeline
            stage may have only one. 'selective': all layers, which keep the outputs of matrix
            products and of attention, too, and compute again what costs little.
        compiled: Whether layers will be compiled. It is the compiler then that sees to 'selective',
            as `internlm_mm.parallel.compiling` tells it, and fuses what it computes again.

    Returns:
        How many layers recompute.

    Raises:
        ValueError: If `recompute` is out of range or a budget, from which nobody has told a share
            yet, or if the model has no layers to choose from.
    """
    share = check_recompute(recompute)
    if share is None:
        raise ValueError(
            f'strategy.recompute={recompute!r}: the runner decides what a budget means, before '
            'the model is placed; a strategy on its own takes a share of the layers'
        )
    layers = list(layers_of(model))
    if share and not layers:
        raise ValueError(f'strategy.recompute={recompute}: {type(model).__name__} has no `layers`')
    if isinstance(share, str):
        contexts = partial(create_selective_checkpoint_contexts, kept_operations())
        for layer in [] if compiled else layers:
            layer.forward = _recomputing(layer.forward, context_fn=contexts)
        return len(layers)
    chosen = layers[: max(round(len(layers) * share), share > 0)]
    for layer in chosen:
        # Replacing `forward` keeps the layer's name and its parameters' names, which a wrapper
        # would not.
        forward = _recomputing(layer.forward)
        forward.repeats_products = True
        layer.forward = forward
    return len(chosen)


def _recomputing(forward: Callable[..., Any], **options: Any) -> Any:
    """A function of this file's, into which the compiler follows, as it does not into torch's."""

    def recomputing_forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)

    return recomputing_forward


def recomputed_layers(model: nn.Module) -> tuple[int, int]:
    """How many layers of a model compute their products again, and how many there are."""
    layers = list(layers_of(model))
    chosen = [getattr(layer.forward, 'repeats_products', False) for layer in layers]
    return sum(chosen), len(layers)


def kept_operations() -> list[Any]:
    """The operations whose outputs 'selective' keeps, of those that this torch has."""
    found = []
    for name in _KEPT:
        namespace, operation = name.split('::')
        packet = getattr(getattr(torch.ops, namespace), operation, None)
        if packet is not None:
            found.append(packet.default)
    return found
