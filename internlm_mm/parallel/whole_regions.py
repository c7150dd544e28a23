"""Layers that compute everything again: what is changed in the graphs of compiled ones.

The compiler is told by a mark on each operation of the layer. Those inside a function that brings
its own backward pass, as a product that adds up its weight's gradient does, get none in torch 2.11:
their results were kept, three quarters of what such layers are there to forget.
"""

from __future__ import annotations

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy

_MARK = 'recompute'
_AGAIN = (CheckpointPolicy.PREFER_RECOMPUTE, CheckpointPolicy.MUST_RECOMPUTE)


class WholeRegions(CustomGraphPass):
    """A pass of inductor over the graph of forward and backward, before it is parted.

    It is for layers that are computed again as a whole or not at all.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Mark what follows from the inputs of forward alone, if anything is marked.

        Args:
            graph: Of aten's operations.
        """
        marked = next((node for node in graph.nodes if node.meta.get(_MARK) in _AGAIN), None)
        if marked is None:
            return
        of_backward: set[fx.Node] = set()
        for node in graph.nodes:
            if is_gradient(node) or not of_backward.isdisjoint(node.all_input_nodes):
                of_backward.add(node)
            elif node.op == 'call_function' and node.meta.get(_MARK) is None:
                node.meta[_MARK] = marked.meta[_MARK]
                node.meta['ac_graph_id'] = marked.meta.get('ac_graph_id', 0)

    def uuid(self) -> bytes:
        """For inductor's cache of compiled graphs."""
        return get_hash_for_files((__file__,))


def is_gradient(node: fx.Node) -> bool:
    """Whether a node is a gradient that backward is given, by the name that torch gives it."""
    return node.op == 'placeholder' and 'tangents' in str(node.target)
