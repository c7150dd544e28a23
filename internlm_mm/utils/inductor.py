"""What torch's compiler, inductor, can be told."""

from collections.abc import Mapping
from typing import Any

import torch


def known_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that this torch's inductor has.

    Args:
        options: By their dotted names in `torch._inductor.config`.
    """
    # An attribute that torch imports when it is asked for.
    return {name: options[name] for name in options if _has(torch._inductor.config, name)}


def _has(config: Any, name: str) -> bool:
    for part in name.split('.'):
        if not hasattr(config, part):
            return False
        config = getattr(config, part)
    return True
