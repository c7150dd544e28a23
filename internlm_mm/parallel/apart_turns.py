"""Turned copies by a kernel of ours: what is changed in the graphs of layers in 8 bits.

Products of 8 bits read an operand turned. Inductor writes a turned copy where it computes the
matrix, in tiles that reach half of memory's speed; and in a norm's backward, in a kernel that goes
along rows to sum them, a byte here and a byte there. To write matrices as they lie and to turn them
apart reads a byte more for each number, but at the speed of memory. So are turned:

- what a graph is given, as weights are;
- what is needed both ways, but for gates, whose exponentials take the time;
- outputs of norms, which are needed turned alone, but share their kernel with sums of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

import internlm_mm.parallel.late_turns  # noqa: F401  whose operation stands around weights

_aten = torch.ops.aten
_VIEWS = frozenset(
    (
        _aten.permute.default,
        _aten.reshape.default,
        _aten.view.default,
        _aten.expand.default,
        _aten.unsqueeze.default,
        _aten.squeeze.dim,
        _aten.squeeze.dims,
        _aten.t.default,
        _aten.transpose.int,
    )
)
_SUMS = frozenset((_aten.sum.dim_IntList, _aten.mean.dim))
_EXPONENTIALS = frozenset((_aten.exp.default, _aten.sigmoid.default, _aten.tanh.default))


@torch.library.custom_op('internlm_mm::turned', mutates_args=())
def turned(matrix: Tensor) -> Tensor:
    """A copy with rows for columns.

    Args:
        matrix: Contiguous, of numbers of one byte, [rows, columns].

    Returns:
        [columns, rows].
    """
    if matrix.is_cuda:
        from internlm_mm.ops.turned import turn

        return turn(matrix)
    bytes_ = matrix.view(torch.uint8)
    return bytes_.t().clone(memory_format=torch.contiguous_format).view(matrix.dtype)


@turned.register_fake
def _(matrix: Tensor) -> Tensor:
    return matrix.new_empty(matrix.shape[1], matrix.shape[0])


class ApartTurns(CustomGraphPass):
    """A pass of inductor over the graphs of forward and backward; no result changes by a bit."""

    def __call__(self, graph: fx.Graph) -> None:
        """Change a graph in place.

        Args:
            graph: Of aten's operations.
        """
        for node in list(graph.nodes):
            if not _is_turned_copy(node):
                continue
            source = node.args[0]
            if not _is_better_apart(source):
                continue
            with graph.inserting_before(node):
                back = graph.call_function(_aten.permute.default, (source, [1, 0]))
                copy = graph.call_function(torch.ops.internlm_mm.turned.default, (back,))
            back.meta['val'] = source.meta['val'].permute(1, 0)
            copy.meta.update(node.meta)
            node.replace_all_uses_with(copy)
            graph.erase_node(node)

    def uuid(self) -> bytes:
        """For inductor's cache of compiled graphs."""
        return get_hash_for_files((__file__,))


def _is_turned_copy(node: fx.Node) -> bool:
    """Whether a node is a contiguous copy of a contiguous matrix of bytes that is read turned."""
    if node.target != _aten.clone.default or not isinstance(node.args[0], fx.Node):
        return False
    made, source = node.meta.get('val'), node.args[0].meta.get('val')
    if made is None or source is None or made.itemsize != 1 or made.ndim != 2:
        return False
    return made.is_contiguous() and source.t().is_contiguous() and not source.is_contiguous()


def _is_better_apart(turned_matrix: fx.Node) -> bool:
    node, is_needed_as_it_lies = turned_matrix, False
    while node.target in _VIEWS or node.target == torch.ops.internlm_mm.later.default:
        node = node.args[0]  # type: ignore[assignment]  # of views the first argument is a node
        is_needed_as_it_lies |= len(node.users) > 1
    if node.op == 'placeholder':
        return True
    makers = _made_of(node)
    if any(_is_of_rows(one) for one in makers):
        return True
    return is_needed_as_it_lies and not any(one.target in _EXPONENTIALS for one in makers)


def _made_of(node: fx.Node) -> set[fx.Node]:
    """What computes a node number by number, sums on the way, and what that begins with."""
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        if one.target in _VIEWS or one.target in _SUMS or _is_elementwise(one):
            waiting += one.all_input_nodes
    return seen


def _is_of_rows(node: fx.Node) -> bool:
    """Whether a node has one number for each of many rows, as a norm has."""
    made = node.meta.get('val')
    return isinstance(made, Tensor) and made.ndim > 1 and made.shape[-1] == 1 < made.numel()


def _is_elementwise(node: fx.Node) -> bool:
    if node.target == torch.ops.prims.convert_element_type.default:
        return True
    return torch.Tag.pointwise in getattr(node.target, 'tags', ())
