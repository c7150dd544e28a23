"""An optimizer step that only goes downhill."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from internlm_mm.optim import HybridZeroOptimWrapper
from internlm_mm.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class CautiousOptimWrapper(HybridZeroOptimWrapper):
    """Take back, number by number, what a step of any optimizer moved along the gradient.

    Momentum sometimes points uphill; the cautious optimizers of https://arxiv.org/abs/2411.16085 do
    not follow it there. Their rescaling of what remains is left out. Works on each rank's own part
    of the weights, so the layout does not matter; a step holds a second copy of that part.

    Norm, clipping, loss scale and skipped steps are `HybridZeroOptimWrapper`'s, and so are the
    options.
    """

    def step(self, **kwargs: Any) -> None:
        """One step of the optimizer, corrected; gradients are still those of this step."""
        parameters = [
            parameter
            for group in self.optimizer.param_groups
            for parameter in group['params']
            if parameter.grad is not None
        ]
        before = [_local(parameter).detach().clone() for parameter in parameters]
        super().step(**kwargs)
        with torch.no_grad():
            for parameter, old in zip(parameters, before, strict=True):
                new = _local(parameter)
                uphill = (new - old) * _local(parameter.grad) > 0
                new.copy_(torch.where(uphill, old, new))


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
