"""Gradients of gates that are held: written once, in 16 bits, and turned apart."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config

from internlm_mm.parallel import compiling, float8, kept_gates
from internlm_mm.parallel.apart_turns import ApartTurns
from internlm_mm.parallel.kept_gates import KeptGates
from internlm_mm.parallel.kept_scales import KeptScales
from tests.test_parallel.test_float8 import has_torchao, quiet
from tests.test_parallel.test_late_turns import step

KEPT = torch.ops.internlm_mm.kept.default
TURNED = torch.ops.internlm_mm.turned.default
TOP = torch.finfo(torch.float8_e5m2).max


def compiled(function: Callable, *inputs: Any, gates: bool = True) -> tuple[Any, list[Any]]:
    """What a function gives when compiled with the passes, and what its graph calls."""
    seen: list[Any] = []
    torch._dynamo.reset()
    passes = [KeptScales(), *([KeptGates()] if gates else []), ApartTurns()]
    patches = {
        'post_grad_custom_pre_pass': compiling._InTurn(*passes),
        'post_grad_custom_post_pass': lambda graph: seen.extend(n.target for n in graph.nodes),
        'fx_graph_cache': False,
    }
    with config.patch(patches):
        return torch.compile(function)(*inputs), seen


def rounded(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As torchao rounds a gradient: with one scale, as it lies and turned."""
    scale = (TOP / x.abs().max().double().clamp(min=1e-12)).float()
    matrix = (x.float() * scale).clamp(-TOP, TOP).to(torch.float8_e5m2)
    return matrix, matrix.t().contiguous(), scale


def gradient(gate: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """Of a gate, in half precision as an operator of its own gives it."""
    return torch.ops.aten.silu_backward(out * up, gate)


def draw() -> list[Tensor]:
    return list(torch.randn(3, 64, 48, dtype=torch.bfloat16).unbind())


@pytest.mark.slow
def test_a_gates_gradient_is_held_once_and_turned_apart() -> None:
    """And what comes of it is to the bit the rounding of numbers in 16 bits."""
    inputs = draw()
    found, seen = compiled(lambda *given: rounded(gradient(*given)), *inputs)
    assert (seen.count(KEPT), seen.count(TURNED)) == (2, 1)  # the scale and the gradient
    exact, _ = compiled(gradient, *inputs)
    expected = rounded(exact)
    for ours, theirs in zip(found, expected, strict=True):
        raw = (x.view(torch.uint8) if x.itemsize == 1 else x for x in (ours, theirs))
        assert ours.stride() == theirs.stride() and torch.equal(*raw)
    _, seen = compiled(lambda *given: rounded(gradient(*given)), *inputs, gates=False)
    assert (seen.count(KEPT), seen.count(TURNED)) == (1, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    'maker',
    [
        lambda gate, up, out: out * up,  # no exponential
        lambda gate, up, out: gradient(gate.float(), up.float(), out.float()),  # never 16 bits
        lambda gate, up, out: gradient(gate, up, out) @ torch.ones_like(up[:48]),  # a product's
    ],
    ids=['no gate', 'float32', 'product'],
)
def test_others_are_left_alone(maker: Callable) -> None:
    inputs = draw()
    found, seen = compiled(lambda *given: rounded(maker(*given)), *inputs)
    assert seen.count(KEPT) == 1  # its scale
    expected, _ = compiled(lambda *given: rounded(maker(*given)), *inputs, gates=False)
    for ours, theirs in zip(found, expected, strict=True):
        raw = (x.view(torch.uint8) if x.itemsize == 1 else x for x in (ours, theirs))
        assert torch.equal(*raw)


@pytest.mark.slow
def test_one_that_is_turned_alone_is_not_held() -> None:
    _, seen = compiled(lambda *given: rounded(gradient(*given))[1:], *draw())
    assert (seen.count(KEPT), seen.count(TURNED)) == (1, 0)


@has_torchao
@quiet
@pytest.mark.slow
def test_a_step_is_as_near_to_one_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, 'float8_obstacles', lambda *_args, **_options: [])
    calls, original = [], kept_gates.keep
    monkeypatch.setattr(
        kept_gates, 'keep', lambda graph, node: (calls.append(node), original(graph, node))
    )
    compiling._compiler.cache_clear()
    found, _ = step('selective')
    others = compiling._InTurn(KeptScales(), ApartTurns())
    plain_options = {**compiling._IN_BYTES, 'post_grad_custom_pre_pass': others}
    monkeypatch.setattr(compiling, '_IN_BYTES', plain_options)
    compiling._compiler.cache_clear()
    plain, _ = step('selective')
    compiling._compiler.cache_clear()
    monkeypatch.setattr('tests.test_parallel.test_late_turns.compile_layers', lambda *_, **__: None)
    single, _ = step('selective')
    assert len(calls) == 2  # of gate and up, in the graph that all layers share
    weights = [name for name in single if 'proj' in name]
    far = [
        sum((one[name] - single[name]).square().sum().item() for name in weights)
        for one in (found, plain)
    ]
    assert 0 < far[0] < 1.2 * far[1]


def test_the_cache_of_compiled_graphs_knows_the_pass() -> None:
    assert KeptGates().uuid() == KeptGates().uuid() != ApartTurns().uuid()
