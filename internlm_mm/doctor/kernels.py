"""Which kernels besides attention can run here, and why the others cannot."""

from typing import Any

import torch

from internlm_mm.ops.needs import Needs, obstacles
from internlm_mm.parallel.float8 import float8_obstacles
from internlm_mm.registry import CROSS_ENTROPIES, NORMS
from internlm_mm.utils.apex import missing_apex


def examine_kernels(device: torch.device, dtype: torch.dtype) -> dict[str, list[str]]:
    """Ask of everything that a config can name what it needs.

    Args:
        device: Where it would run.
        dtype: What it would compute in.

    Returns:
        By key and value of a config every reason why it cannot run; no reason if it can.
    """
    found: dict[str, list[str]] = {}
    registries: tuple[tuple[str, Any], ...] = (('norm', NORMS), ('cross_entropy', CROSS_ENTROPIES))
    for key, registry in registries:
        for name in sorted(registry.module_dict):
            kernel = registry.get(name)
            reasons = obstacles(getattr(kernel, 'needs', Needs()), device, dtype)
            reasons += getattr(kernel, 'missing', list)()
            found[f'strategy.kernels.{key}={name}'] = reasons
    found['strategy.float8'] = float8_obstacles(device, dtype)
    adam = 'optim_wrapper.optimizer.type=FusedAdam'
    found[adam] = obstacles(Needs(cuda=True), device, dtype)
    found[adam] += missing_apex('optimizers')
    return found
