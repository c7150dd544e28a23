"""Names of adapters' parameters, by which packages that know no model tell them from others."""

MARK = '.lora_'
"""What parts a layer's name from its adapter's: `layers.0.mlp.up_proj`, `.lora_`, `A.weight`."""


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return MARK in name


def layer_of(name: str) -> str:
    """Name of the layer that a parameter, of it or of its adapter, belongs to."""
    return name.partition(MARK)[0] if is_adapter(name) else name.rpartition('.')[0]
