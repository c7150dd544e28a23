"""Layers that compute everything again: which operations are marked, and what is kept then."""

import pytest
import torch
from torch import fx, nn
from torch.utils.checkpoint import CheckpointPolicy

from internlm_mm.ops.gradient_sum import AddingLinear
from internlm_mm.parallel.compiling import compile_layers
from internlm_mm.parallel.recompute import recompute_layers
from internlm_mm.parallel.whole_regions import WholeRegions
from tests.test_parallel.test_recompute import model, run_forward


def joint(marked: bool) -> tuple[fx.Graph, dict[str, fx.Node]]:
    """`relu(x @ w) + x` and a gradient, of which the product bears no mark."""
    graph = fx.Graph()
    x, w, tangent = (graph.placeholder(n) for n in ('primals_1', 'primals_2', 'tangents_1'))
    call = graph.call_function
    product = call(torch.ops.aten.mm.default, (x, w))
    relu = call(torch.ops.aten.relu.default, (product,))
    total = call(torch.ops.aten.add.Tensor, (relu, x))
    turned = call(torch.ops.aten.t.default, (w,))  # of backward, but it needs no gradient
    grad = call(torch.ops.aten.mul.Tensor, (tangent, relu))
    grad_x = call(torch.ops.aten.mm.default, (grad, turned))
    graph.output((total, grad_x))
    nodes = dict(
        x=x, w=w, tangent=tangent, product=product, relu=relu,
        total=total, turned=turned, grad=grad, grad_x=grad_x,
    )  # fmt: skip
    if marked:
        for node in (relu, total):
            node.meta |= {'recompute': CheckpointPolicy.PREFER_RECOMPUTE, 'ac_graph_id': 7}
    return graph, nodes


def test_marks_spread_over_forward_alone() -> None:
    graph, nodes = joint(marked=True)
    WholeRegions()(graph)
    marks = {name: node.meta.get('recompute') for name, node in nodes.items()}
    again = CheckpointPolicy.PREFER_RECOMPUTE
    assert {name for name, mark in marks.items() if mark == again} == {
        'product', 'relu', 'total', 'turned',
    }  # fmt: skip
    assert {node.meta['ac_graph_id'] for node in nodes.values() if node.meta} == {7}
    assert all(marks[name] is None for name in ('x', 'w', 'tangent', 'grad', 'grad_x'))


def test_what_must_be_kept_stays_so() -> None:
    graph, nodes = joint(marked=True)
    nodes['product'].meta['recompute'] = CheckpointPolicy.MUST_SAVE
    WholeRegions()(graph)
    assert nodes['product'].meta == {'recompute': CheckpointPolicy.MUST_SAVE}


def test_layers_that_keep_are_left_alone() -> None:
    graph, nodes = joint(marked=False)
    WholeRegions()(graph)
    assert not any(node.meta for node in nodes.values())


def kept(recompute: float, adding: bool) -> int:
    """Bytes of activations that compiled layers keep."""
    torch._dynamo.reset()
    module = model()
    if adding:
        anchor = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        for layer in module.layers.values():
            for linear in layer.modules():
                if type(linear) is nn.Linear:
                    linear.__class__ = AddingLinear
                    linear.gradient_anchor = anchor
    recompute_layers(module, recompute, compiled=True)
    compile_layers(module, recompute)
    return run_forward(module)[1]


# Dynamo looks for gradients everywhere.
@pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor that is not a leaf')
# It makes one of a function to follow into it.
@pytest.mark.filterwarnings('ignore:.*should not be instantiated:DeprecationWarning')
@pytest.mark.slow
def test_products_with_a_backward_of_their_own_are_not_kept() -> None:
    assert kept(1.0, adding=True) == kept(1.0, adding=False) < kept(0.0, adding=True) / 3


def test_the_cache_of_compiled_graphs_knows_the_pass() -> None:
    assert WholeRegions().uuid() == WholeRegions().uuid() != b''
