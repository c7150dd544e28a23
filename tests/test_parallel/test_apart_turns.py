"""Turned copies that are made apart: the same bits, and only where that is less work."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config

from internlm_mm.parallel import compiling, float8
from internlm_mm.parallel.apart_turns import ApartTurns, turned
from internlm_mm.parallel.kept_scales import KeptScales
from tests.test_parallel.test_float8 import has_torchao, quiet
from tests.test_parallel.test_late_turns import step

TURNED = torch.ops.internlm_mm.turned.default
CLONE = torch.ops.aten.clone.default


def compiled(function: Callable, *inputs: Any) -> tuple[Any, list[Any]]:
    """What a function gives when compiled with the pass, and what its graph calls."""
    seen: list[Any] = []
    torch._dynamo.reset()
    patches = {
        'post_grad_custom_pre_pass': ApartTurns(),
        'post_grad_custom_post_pass': lambda graph: seen.extend(n.target for n in graph.nodes),
        'fx_graph_cache': False,
    }
    with config.patch(patches):
        return torch.compile(function)(*inputs), seen


def rounded(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn)


def turned_alone(x: Tensor) -> Tensor:
    return rounded(x).t().contiguous()


def both_ways(x: Tensor) -> tuple[Tensor, Tensor]:
    matrix = rounded(x)
    return matrix, matrix.t().contiguous()


def normed(x: Tensor) -> Tensor:
    return x * x.square().mean(-1, keepdim=True).rsqrt()


def normed_in_rows(x: Tensor) -> Tensor:
    return x * x.view(4, 16, 48).sum(-1, keepdim=True).expand(4, 16, 48).flatten(0, 1)


def scaled(x: Tensor) -> Tensor:
    return x * 448 / x.abs().max()


def without_its_mean(x: Tensor) -> Tensor:
    return x - x.mean((0, 1), keepdim=True)


def gated(x: Tensor) -> Tensor:
    return nn.functional.silu(x) * x


def product(x: Tensor) -> Tensor:
    return (x / x.sum(-1, keepdim=True)) @ torch.ones(48, 32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('maker', 'alone', 'both'),
    [
        (normed, True, True),
        (normed_in_rows, True, True),
        (scaled, False, True),
        (without_its_mean, False, True),
        (gated, False, False),
        (product, False, True),
    ],
)
def test_what_is_turned_apart(maker: Callable, alone: bool, both: bool) -> None:
    x = torch.randn(64, 48)
    found, seen = compiled(lambda x: turned_alone(maker(x)), x)
    assert (seen.count(TURNED), seen.count(CLONE)) == (alone, not alone)
    found_both, seen = compiled(lambda x: both_ways(maker(x)), x)
    assert (seen.count(TURNED), seen.count(CLONE)) == (both, not both)
    matrix, turned_one, single = (one.view(torch.uint8) for one in (*found_both, found))
    assert turned_one.is_contiguous() and torch.equal(turned_one, matrix.t())
    assert single.is_contiguous() and torch.equal(single, turned_one)


@pytest.mark.slow
def test_what_a_norm_kept_for_backward() -> None:
    x, kept_roots = torch.randn(64, 48), torch.rand(64, 1)
    found, seen = compiled(lambda x, roots: turned_alone(x * roots), x, kept_roots)
    assert (seen.count(TURNED), seen.count(CLONE)) == (1, 0)
    expected = rounded(x * kept_roots).view(torch.uint8)
    assert torch.equal(found.view(torch.uint8), expected.t())


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_matrix_that_is_given(dtype: torch.dtype) -> None:
    matrix = torch.randn(64, 48).to(dtype)
    found, seen = compiled(lambda x: x.t().contiguous(), matrix)
    assert seen.count(TURNED) == 1
    assert found.is_contiguous() and found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), matrix.view(torch.uint8).t())


@pytest.mark.slow
def test_rows_of_any_number() -> None:
    """One graph for all numbers of rows, but for one row, which lies as its turned copy does."""
    torch._dynamo.reset()
    with config.patch(post_grad_custom_pre_pass=ApartTurns(), fx_graph_cache=False):
        function = torch.compile(lambda x: both_ways(normed(x)), dynamic=True)
        for rows in (64, 32, 1, 128):
            matrix, turned_one = function(torch.randn(rows, 48))
            assert torch.equal(turned_one.view(torch.uint8), matrix.view(torch.uint8).t())


@pytest.mark.slow
def test_other_copies_are_left_alone() -> None:
    inputs = torch.randn(64, 48), torch.randn(4, 8, 6).to(torch.float8_e4m3fn)
    found, seen = compiled(
        lambda wide, cube: (wide.t().contiguous(), cube.transpose(1, 2).contiguous()), *inputs
    )
    assert seen.count(TURNED) == 0
    assert torch.equal(found[0], inputs[0].t())


@has_torchao
@quiet
@pytest.mark.slow
@pytest.mark.parametrize('recompute', [0.0, 1.0, 'selective'])
def test_a_step_keeps_its_bits(monkeypatch: pytest.MonkeyPatch, recompute: float | str) -> None:
    monkeypatch.setattr(float8, 'float8_obstacles', lambda *_args, **_options: [])
    calls = []

    def counting(matrix: Tensor) -> Tensor:
        calls.append(matrix.shape)
        return matrix.t().contiguous()

    compiling._compiler.cache_clear()
    with torch.library._scoped_library('internlm_mm', 'IMPL') as library:
        library.impl('turned', counting, 'CPU', allow_override=True)
        found, _ = step(recompute)
    plain_options = {**compiling._IN_BYTES, 'post_grad_custom_pre_pass': KeptScales()}
    monkeypatch.setattr(compiling, '_IN_BYTES', plain_options)
    compiling._compiler.cache_clear()
    plain, _ = step(recompute)
    compiling._compiler.cache_clear()
    assert calls
    for name, value in plain.items():
        assert (value is None) == (found[name] is None), name
        assert value is None or torch.equal(found[name], value), name


@pytest.mark.parametrize('shape', [(3, 2), (1, 5), (0, 4)])
def test_the_operation_is_a_turned_copy(shape: tuple[int, int]) -> None:
    matrix = torch.randint(0, 255, shape, dtype=torch.uint8)
    found = turned(matrix)
    assert found.is_contiguous() and torch.equal(found, matrix.t())
    torch.library.opcheck(turned, (matrix,))


def test_the_cache_of_compiled_graphs_knows_the_pass() -> None:
    assert ApartTurns().uuid() == ApartTurns().uuid() != KeptScales().uuid()
