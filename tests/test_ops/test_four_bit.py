"""Weights in 4 bits against the definition of NF4, where bitsandbytes is installed."""

import pytest
import torch

from internlm_mm.ops import LowRank, low_rank_linear, row_norms, to_four_bit
from internlm_mm.ops.four_bit import BLOCK

pytest.importorskip('bitsandbytes')

# https://arxiv.org/abs/2305.14314, appendix E.
LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
])  # fmt: skip


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(48, 2 * BLOCK, generator=torch.Generator().manual_seed(0))


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """By the definition: the nearest level of each block's largest number."""
    blocks = weight.reshape(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / scales).unsqueeze(-1) - LEVELS).abs().argmin(-1)
    return (LEVELS[nearest] * scales).reshape(weight.shape)


def test_every_number_is_the_nearest_level(weight) -> None:
    four = to_four_bit(weight)
    assert four.packed.numel() == weight.numel() // 2 and four.packed.dtype == torch.uint8
    assert four.scales.numel() == weight.numel() // BLOCK
    torch.testing.assert_close(four.whole(torch.float32), rounded(weight), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('dora', [False, True])
def test_products_and_gradients_are_those_of_the_rounded_weight(weight, dora: bool) -> None:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    x, bias = draw(2, 5, 2 * BLOCK), draw(48)
    change = LowRank(draw(3, 2 * BLOCK), draw(48, 3), 0.5, magnitude=draw(48) if dora else None)
    inputs = [x, change.down, change.up] + ([change.magnitude] if dora else [])
    four, plain = to_four_bit(weight), rounded(weight)
    ours = low_rank_linear(x, four, bias, change)
    theirs = low_rank_linear(x, plain, bias, change)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for one, two in zip(
        torch.autograd.grad(ours.square().sum(), inputs),
        torch.autograd.grad(theirs.square().sum(), inputs),
        strict=True,
    ):
        assert (one - two).norm() <= 1e-5 * two.norm()
    torch.testing.assert_close(low_rank_linear(x, four, bias, None), x @ plain.T + bias)
    torch.testing.assert_close(row_norms(four), plain.norm(dim=1))


def test_backward_keeps_four_bits_and_no_more(weight) -> None:
    kept = []
    x = torch.randn(7, 2 * BLOCK, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        to_four_bit(weight).multiply(x).sum()
    assert {tensor.dtype for tensor in kept} == {torch.uint8, torch.float32}
    assert sum(tensor.nbytes for tensor in kept) <= weight.numel() * (1 / 2 + 4 / BLOCK)


def test_the_operation_is_one_to_torch(weight) -> None:
    from internlm_mm.ops.four_bit import four_bit_gradient, four_bit_product

    four = to_four_bit(weight)
    x = torch.randn(2, 3, 2 * BLOCK, requires_grad=True)
    torch.library.opcheck(four_bit_product, (x, four.packed, four.scales, [48, 2 * BLOCK]))
    grad = torch.randn(2, 3, 48)
    torch.library.opcheck(four_bit_gradient, (grad, four.packed, four.scales, [48, 2 * BLOCK]))


# Dynamo looks for gradients everywhere.
@pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor that is not a leaf')
def test_compiled_layers_keep_four_bits_and_no_more(weight) -> None:
    """A compiler that sees the weight made whole twice would keep it in between."""
    four, kept = to_four_bit(weight), []
    change = LowRank(torch.randn(3, 2 * BLOCK), torch.randn(48, 3), 0.5)
    x = torch.randn(2, 5, 2 * BLOCK, requires_grad=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return low_rank_linear(x, four, None, change).sin()

    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend='aot_eager_decomp_partition', fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        total = compiled(x).sum()
    (found,) = torch.autograd.grad(total, x)
    torch.testing.assert_close(found, expected)
    assert all(tensor.shape != weight.shape for tensor in kept)
    assert any(tensor.dtype == torch.uint8 for tensor in kept)
