"""Scales of whole matrices, computed once: what is changed in the graphs of layers in 8 bits.

A scale is one number, computed in float64 from the largest value of a matrix. Left alone, inductor
computes it where it is used: every thread that rounds with it does that arithmetic anew, which took
a quarter of the time of a gate's backward kernel on an H200. Kept in memory it is loaded instead.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files


@torch.library.custom_op('internlm_mm::kept', mutates_args=())
def kept(number: Tensor) -> Tensor:
    """The number itself; inductor writes it to memory, and those that use it load it.

    Args:
        number: Of any shape.
    """
    return number.clone()


@kept.register_fake
def _(number: Tensor) -> Tensor:
    return torch.empty_like(number)


class KeptScales(CustomGraphPass):
    """A pass of inductor over the graphs of forward and backward; no result changes by a bit."""

    def __call__(self, graph: fx.Graph) -> None:
        """Change a graph in place.

        Args:
            graph: Of aten's operations.
        """
        _tell_inductor()
        for node in list(graph.nodes):
            if not _is_scale(node):
                continue
            with graph.inserting_after(node):
                scale = graph.call_function(torch.ops.internlm_mm.kept.default, (node,))
            scale.meta.update(node.meta)
            node.replace_all_uses_with(scale, lambda user, scale=scale: user is not scale)

    def uuid(self) -> bytes:
        """For inductor's cache of compiled graphs."""
        return get_hash_for_files((__file__,))


def _is_scale(node: fx.Node) -> bool:
    """Whether a node is one number in float32 that was computed in float64."""
    if node.target != torch.ops.prims.convert_element_type.default:
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node), 'only tensors are converted'
    before, after = source.meta.get('val'), node.meta.get('val')
    if before is None or after is None:  # nothing is known of it
        return False
    return after.ndim == 0 and (before.dtype, after.dtype) == (torch.float64, torch.float32)


@cache  # once for a process
def _tell_inductor() -> None:
    # Whoever calls this pass has imported that module.
    register = torch._inductor.lowering.register_lowering

    @register(torch.ops.internlm_mm.kept.default, type_promotion_kind=None)
    def lower_kept(number):  # a TensorBox, of which torch has no public name
        number.realize()
        return number
