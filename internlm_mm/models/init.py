"""Initialisation by rule: what a parameter gets follows from its name alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class NormalInit(NamedTuple):
    """Standard deviations of the normal distributions that weights are drawn from.

    Attributes:
        embedding: Of the embedding table and the head.
        projection: Of every other matrix.
        scale_by_depth: Whether the two projections that write to the residual stream (`o_proj`,
            `down_proj`) of layer i, counted from 0, are divided by sqrt(2 * (i + 1)).
    """

    embedding: float
    projection: float
    scale_by_depth: bool

    def fill(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill one whole parameter: biases with 0, norms with 1, matrices from a normal.

        Args:
            name: The parameter's name in the model.
            tensor: What to fill, in place; on the generator's device.
            generator: The only source of randomness.

        Raises:
            ValueError: If no rule covers the parameter.
        """
        if name.endswith('.bias'):
            tensor.zero_()
        elif name.endswith('norm.weight') and tensor.ndim == 1:
            tensor.fill_(1.0)
        elif name.endswith('.weight') and tensor.ndim == 2:
            tensor.normal_(0.0, self._std(name), generator=generator)
        else:
            raise ValueError(f'no rule initialises {name!r} of shape {list(tensor.shape)}')

    def _std(self, name: str) -> float:
        if name.startswith(('embed_tokens.', 'lm_head.')):
            return self.embedding
        writes_residual = name.endswith(('.o_proj.weight', '.down_proj.weight'))
        if self.scale_by_depth and writes_residual:
            layer = int(name.split('.')[1])
            return self.projection / math.sqrt(2 * (layer + 1))
        return self.projection
