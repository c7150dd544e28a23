"""How far a step moves the weights."""

from typing import Any

import torch
from mmengine.hooks import Hook
from torch import Tensor

from internlm_mm.optim.grad_norm import gradient_norm
from internlm_mm.registry import HOOKS


@HOOKS.register_module()
class UpdateRatioHook(Hook):
    """Measure |change of the weights| / |weights|; about 1e-3 is healthy for AdamW.

    Writes `outputs['update_ratio']`, on the interval only: over all weights and all ranks. The step
    that is measured keeps a second copy of the weights.

    Args:
        interval: Optimizer steps from one reading to the next.

    Raises:
        ValueError: If `interval` is less than 1.
    """

    priority = 'NORMAL'  # before the hooks that print what is written here

    def __init__(self, interval: int = 10) -> None:
        if interval < 1:
            raise ValueError(f'UpdateRatioHook: interval={interval} must be at least 1')
        self.interval = interval
        self._before: list[Tensor] = []

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Keep the weights as they are."""
        if self.every_n_train_iters(runner, self.interval):
            self._before = [weight.detach().clone() for weight in runner.model.parameters()]

    @torch.no_grad()
    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Compare. Collective: sharded weights are summed over their ranks."""
        if self._before:
            pairs = zip(runner.model.parameters(), self._before, strict=True)
            change = gradient_norm([after - before for after, before in pairs])  # any tensors' norm
            outputs['update_ratio'] = float(change / gradient_norm(self._before))
            self._before = []
