"""Linear layers that read the same input."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

Project = Callable[[Tensor, Sequence[nn.Module]], tuple[Tensor, ...]]


def project(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """The output of each layer, one after the other. x: [..., hidden]."""
    return tuple(layer(x) for layer in layers)
