"""Initial values: seeds that follow from a name, so that no rank and no layout matters."""

import hashlib
from typing import Any


def name_seed(seed: int, name: str) -> int:
    """Seed of one tensor: a hash of the run's seed and the tensor's name."""
    return int.from_bytes(hashlib.sha256(f'{seed}/{name}'.encode()).digest()[:7], 'big')


def initializer(model: Any, name: str) -> tuple[Any, str]:
    """Whose `init_parameter` fills a parameter: the innermost module that has one.

    Args:
        model: Has one itself.
        name: The parameter's, in the model.

    Returns:
        The module, and the parameter's name in it.
    """
    owner, local_name, module = model, name, model
    parts = name.split('.')
    for depth, part in enumerate(parts[:-1], 1):
        module = getattr(module, part)
        if hasattr(module, 'init_parameter'):
            owner, local_name = module, '.'.join(parts[depth:])
    return owner, local_name
