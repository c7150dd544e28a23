"""Seeds that follow from the run's seed and a name, so that no rank and no layout matters."""

import hashlib


def name_seed(seed: int, name: str) -> int:
    """Seed of one tensor: a hash of the run's seed and the tensor's name."""
    return int.from_bytes(hashlib.sha256(f'{seed}/{name}'.encode()).digest()[:7], 'big')
