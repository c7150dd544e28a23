"""Scales that are computed once: the same bits, and no float64 where they are used."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from internlm_mm.parallel.kept_scales import KeptScales, kept

KEPT = torch.ops.internlm_mm.kept.default


def compiled(function: Callable, *inputs: Any, on: bool = True) -> tuple[Any, list[Any], str]:
    """What a function compiles to: its results, what its graph calls, and the code."""
    seen: list[Any] = []
    torch._dynamo.reset()
    patches = {
        'post_grad_custom_pre_pass': KeptScales() if on else None,
        'post_grad_custom_post_pass': lambda graph: seen.extend(n.target for n in graph.nodes),
        'fx_graph_cache': False,
    }
    with config.patch(patches):
        found, code = run_and_get_code(torch.compile(function), *inputs)
    return found, seen, '\n'.join(code)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.float8_e4m3fn, torch.float8_e5m2])
def test_bits_stay_and_the_scale_is_loaded(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max

    def rounded(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        """As torchao rounds the input of a product."""
        x = nn.functional.silu(gate) * up
        scale = (top / x.abs().max().double().clamp(min=1e-12)).float()
        matrix = (x.float() * scale).clamp(-top, top).to(dtype)
        return matrix, matrix.t().contiguous(), scale.reciprocal()

    inputs = torch.randn(2, 64, 48, dtype=torch.bfloat16).unbind()
    plain, before, plain_code = compiled(rounded, *inputs, on=False)
    found, after, code = compiled(rounded, *inputs)
    for ours, theirs in zip(found, plain, strict=True):
        assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
        raw = (x.view(torch.uint8) if x.itemsize == 1 else x for x in (ours, theirs))
        assert torch.equal(*raw)
    assert before.count(KEPT) == 0 and after.count(KEPT) == 1
    # Where it was found by all who use it, it is found once, and by no call of ours.
    assert 0 < code.count('double') < plain_code.count('double')
    assert 'internlm_mm.kept' not in '\n'.join(
        line for line in code.splitlines() if not line.lstrip().startswith('#')
    )


@pytest.mark.slow
def test_other_numbers_are_left_alone() -> None:
    def others(x: Tensor) -> tuple[Tensor, ...]:
        rows = x.double().sum(1).float()  # many numbers
        return x * rows[:, None], x * x.sum(), x.double() * x.double().sum()

    x = torch.randn(8, 16)
    expected = others(x)
    found, targets, _ = compiled(others, x)
    assert KEPT not in targets
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_is_kept_is_a_copy() -> None:
    number = torch.tensor(3.0)
    assert kept(number) == 3 and kept(number) is not number
    torch.library.opcheck(kept, (number,))


def test_the_cache_of_compiled_graphs_knows_the_pass() -> None:
    assert KeptScales().uuid() == KeptScales().uuid() != b''
