"""Liger's fused head and cross-entropy (the package `liger-kernel`)."""

from __future__ import annotations

import torch
from torch import Tensor

from internlm_mm.ops.cross_entropy import VocabularyShard, linear_cross_entropy
from internlm_mm.ops.rms_norm import LIGER
from internlm_mm.registry import CROSS_ENTROPIES
from internlm_mm.structures import IGNORE_INDEX

CROSS_ENTROPIES.register_module(name='torch', module=linear_cross_entropy)


@CROSS_ENTROPIES.register_module(name='liger')
def liger_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    chunk: int | None = None,  # noqa: ARG001  Liger chooses its own
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, None]:
    """Summed cross-entropy of `hidden @ weight.T`. Arguments as `linear_cross_entropy`.

    The gradient of `weight` is summed in float32, as there. `chunk` is not read: Liger takes as
    many tokens at a time as its logits have the size of `hidden`. It waits for the GPU once, to
    count the labels.

    Returns:
        The sum, float32 []; None, since Liger does not tell the losses of single tokens.
    """
    from liger_kernel.transformers import functional

    assert shard is None, 'Liger knows no split vocabulary'
    found = functional.liger_fused_linear_cross_entropy(
        hidden,
        weight,
        labels,
        ignore_index=IGNORE_INDEX,
        label_smoothing=label_smoothing,
        reduction='sum',
        accum_dtype=torch.float32,
    )
    return (found[0] if isinstance(found, tuple) else found), None


liger_cross_entropy.needs = LIGER
