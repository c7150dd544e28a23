"""Names of what is learnt beside a base, by which packages that know no model tell it apart."""

from collections.abc import Iterable

MARK = '.lora_'
"""What parts a layer's name from its adapter's: `layers.0.mlp.up_proj`, `.lora_`, `A.weight`."""


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return MARK in name


def layer_of(name: str) -> str:
    """Name of the layer that a parameter, of it or of its adapter, belongs to."""
    return name.partition(MARK)[0] if is_adapter(name) else name.rpartition('.')[0]


def is_score(name: str) -> bool:
    """Whether a parameter of this name is the objective's own, as the score of a reward model."""
    return name.removeprefix('model.').startswith('objective.')


def names_held(names: Iterable[str], stored: Iterable[str]) -> list[str]:
    """What of a model a checkpoint must hold: all, but for what is learnt beside its base.

    Of a model with adapters a checkpoint holds the adapters alone, or all but them, or both. A
    score begins anew where there is none.

    Args:
        names: Of the model's parameters, as the checkpoint has them.
        stored: Of what is in the checkpoint.
    """
    names, found = list(names), set(stored)
    kinds = {is_adapter(name) for name in found if not is_score(name)}
    has_adapters = any(map(is_adapter, names))
    return [
        name
        for name in names
        if (name in found if is_score(name) else not has_adapters or is_adapter(name) in kinds)
    ]
