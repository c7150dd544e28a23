"""Numbers of an optimizer that are out of range, by the config's whole key."""

from collections.abc import Mapping
from typing import Any


def check_numbers(options: Mapping[str, Any]) -> None:
    """Refuse what no optimizer takes.

    Args:
        options: Of `optim_wrapper.optimizer`; keys that are not there, and values that are no plain
            numbers, are left to the optimizer.

    Raises:
        ValueError: With the key and the value.
    """
    for key in ('lr', 'matrix_lr', 'eps', 'weight_decay'):
        value = options.get(key)
        if isinstance(value, (int, float)) and not value >= 0:
            raise ValueError(f'optim_wrapper.optimizer.{key}={value!r} must not be negative')
    betas = options.get('betas')
    if not isinstance(betas, (list, tuple)):
        return
    if any(isinstance(beta, (int, float)) and not 0 <= beta < 1 for beta in betas):
        raise ValueError(f'optim_wrapper.optimizer.betas={tuple(betas)!r}: each must lie in [0, 1)')
