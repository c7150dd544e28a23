"""Weights are turned when backward needs them: what is changed in the graphs of layers in 8 bits.

The product that gives the gradient of a layer's input reads its weight turned, and kernels of 8
bits want a copy for that. Such a copy needs nothing but the weight, so torch's partitioner is free
to make it in forward and to keep it: it takes as much memory as the weight, whose own memory it
does not know to stay anyway. Of the 7 matrices of a layer 4 were kept twice until backward.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from internlm_mm.parallel.whole_regions import is_gradient

_VIEWS = (torch.ops.aten.permute.default, torch.ops.aten.t.default, torch.ops.aten.transpose.int)


@torch.library.custom_op('internlm_mm::later', mutates_args=())
def later(matrix: Tensor, gradient: Tensor) -> Tensor:  # noqa: ARG001  the operation's signature
    """The matrix itself, but for the compiler not before there is a gradient.

    Args:
        matrix: Of any shape.
        gradient: Any tensor that backward gets; it is not read.
    """
    return matrix.clone()


@later.register_fake
def _(matrix: Tensor, gradient: Tensor) -> Tensor:  # noqa: ARG001  the operation's signature
    return torch.empty_like(matrix)


class LateTurns(CustomGraphPass):
    """A pass of inductor over the graph of forward and backward; no result changes by a bit."""

    def __call__(self, graph: fx.Graph) -> None:
        """Change a graph in place.

        Args:
            graph: Of aten's operations, before it is parted.
        """
        gradient = next((node for node in graph.nodes if is_gradient(node)), None)
        if gradient is None:  # of inference
            return
        _tell_inductor()
        for node in list(graph.nodes):
            if not _is_turned_weight(node):
                continue
            source = node.args[0]
            with graph.inserting_before(node):
                late = graph.call_function(torch.ops.internlm_mm.later.default, (source, gradient))
            late.meta.update(source.meta)
            node.replace_input_with(source, late)

    def uuid(self) -> bytes:
        """For inductor's cache of compiled graphs."""
        return get_hash_for_files((__file__,))


def _is_turned_weight(node: fx.Node) -> bool:
    """Whether a node is a copy, in another order, of a matrix in 8 bits that the graph is given."""
    if node.target != torch.ops.aten.clone.default:
        return False
    made, source = node.meta.get('val'), node.args[0]
    if made is None or made.itemsize != 1 or made.ndim != 2:
        return False
    while isinstance(source, fx.Node) and source.target in _VIEWS:
        source = source.args[0]
    return isinstance(source, fx.Node) and source.op == 'placeholder' and not is_gradient(source)


@cache  # once for a process
def _tell_inductor() -> None:
    # Whoever calls this pass has imported that module.
    register = torch._inductor.lowering.register_lowering

    @register(torch.ops.internlm_mm.later.default, type_promotion_kind=None)
    def lower_later(matrix, gradient):  # noqa: ARG001  TensorBoxes, which have no public name
        return matrix
