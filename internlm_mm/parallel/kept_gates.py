"""Gradients of gates, computed once: what is changed in the graphs of layers in 8 bits.

A gate's gradient is needed three times: its largest value makes the scale, then it is rounded, as
it lies and turned. Left alone, inductor computes it from three matrices and with exponentials each
time and never holds it, since elementwise work is said to be cheap. Written once in the layer's
precision it is read instead; then it may be turned apart as other matrices are.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from internlm_mm.parallel.apart_turns import EXPONENTIALS, as_it_lies, is_turned_copy, makers_of
from internlm_mm.parallel.kept_scales import keep


class KeptGates(CustomGraphPass):
    """A pass of inductor over the graphs of forward and backward, to go before `ApartTurns`.

    What is rounded to 8 bits is rounded to the layer's 16 before, as it is without a compiler.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Change a graph in place.

        Args:
            graph: Of aten's operations.
        """
        found: set[fx.Node] = set()
        for node in graph.nodes:
            if is_turned_copy(node):
                matrix, is_needed_both_ways = as_it_lies(node)
                if is_needed_both_ways and not EXPONENTIALS.isdisjoint(
                    one.target for one in makers_of(matrix)
                ):
                    found |= _in_half_precision(matrix)
        for node in found:
            keep(graph, node)

    def uuid(self) -> bytes:
        """For inductor's cache of compiled graphs."""
        return get_hash_for_files((__file__,))


def _in_half_precision(rounded: fx.Node) -> set[fx.Node]:
    """What a matrix was rounded from, on the way that numbers go; nothing if it never was so."""
    node = rounded
    while node.op == 'call_function':
        made = node.meta['val']
        if made.dtype in (torch.bfloat16, torch.float16):
            return {node}
        alike = [one for one in node.all_input_nodes if one.meta['val'].numel() == made.numel()]
        if len(alike) != 1:
            return set()
        node = alike[0]
    return set()
