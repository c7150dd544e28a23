"""Sums of gradients: products that add to them, compiled or not, and how they are found."""

import gc

import pytest
import torch
from torch import Tensor, nn

from internlm_mm.ops.cross_entropy import linear_cross_entropy, linear_token_losses
from internlm_mm.ops.gradient_sum import (
    AddingLinear,
    add_product,
    add_scaled,
    find_sum,
    find_sums_with,
)

ON_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device'),
]
DEVICES = ['cpu', pytest.param('cuda', marks=ON_CUDA)]


class Sum:
    """Of one gradient, in a dtype of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.total = dtype, None

    def get(self) -> Tensor | None:
        return self.total

    def put(self, total: Tensor) -> None:
        assert self.total is None and total.dtype == self.dtype
        self.total = total


class Sums:
    """Of the weights of linear layers."""

    def __init__(self, weights: list[Tensor], dtype: torch.dtype) -> None:
        self.sums = {weight.data_ptr(): Sum(dtype) for weight in weights}

    def __call__(self, weight: Tensor) -> Sum | None:
        return self.sums.get(weight.data_ptr())


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('half', [torch.bfloat16, torch.float16])
def test_products_are_not_rounded_in_between(half: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(2)
    pairs = [
        tuple(torch.randn(48, n, generator=generator).to(device, half) for n in (16, 24))
        for _ in range(3)
    ]
    total = None
    for left, right in pairs:
        found = add_product(total, left, right, torch.float32)
        assert total is None or found is total
        total = found
    expected = sum(left.double().T @ right.double() for left, right in pairs)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)


def test_products_in_one_dtype() -> None:
    left, right = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    total = add_product(None, left, right, torch.float64)
    torch.testing.assert_close(add_product(total, left, right, torch.float64), 2 * left.T @ right)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_scaled(dtype: torch.dtype) -> None:
    into, scale = Sum(dtype), torch.tensor(0.5)
    for _ in range(3):
        add_scaled(into, torch.full((2, 3), 8.0), scale)
    assert into.total.dtype == dtype and into.total.tolist() == [[12.0] * 3] * 2


class Layer(nn.Module):
    """Two products, whose second needs an activation that can be computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(x.tanh())))


@pytest.mark.parametrize(
    'backend',
    [
        None,
        pytest.param('aot_eager', marks=pytest.mark.slow),
        pytest.param('inductor', marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings('ignore:.*should not be instantiated:DeprecationWarning')
@pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor that is not a leaf')
def test_layers_add_to_sums(backend: str | None) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(*(Layer() for _ in range(3))).double()
    batches = [torch.randn(2, 4, 6, dtype=torch.float64) for _ in range(2)]
    for x in batches:
        layers(x).square().sum().backward()
    expected = {name: p.grad for name, p in layers.named_parameters()}
    layers.zero_grad()

    linears = [module for module in layers.modules() if isinstance(module, nn.Linear)]
    sums = Sums([linear.weight for linear in linears], torch.float64)
    find_sums_with(sums)
    anchor = torch.zeros(1, requires_grad=True, dtype=torch.float64)
    for linear in linears:
        linear.__class__ = AddingLinear
        linear.gradient_anchor = anchor
    if backend is not None:
        torch._dynamo.reset()
        for layer in layers:
            layer.compile(backend=backend, fullgraph=True)
    for x in batches:
        layers(x).square().sum().backward()
    for name, want in expected.items():
        found = layers.get_parameter(name)
        if found.ndim == 2:
            assert found.grad is None
            found = sums(found).total
        else:
            found = found.grad
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12, msg=name)
    assert anchor.grad.tolist() == [0.0]
    with torch.no_grad():
        torch.testing.assert_close(linears[0](x), nn.functional.linear(x, *linears[0].parameters()))


def test_without_a_sum_it_is_refused() -> None:
    layer = AddingLinear(3, 2)
    layer.gradient_anchor = torch.zeros(1, requires_grad=True)
    with pytest.raises(RuntimeError, match=r'no sum was found .* \[2, 3\]'):
        layer(torch.randn(4, 3)).sum().backward()


def test_finders_go_with_whoever_keeps_them() -> None:
    weight = torch.randn(2, 2)
    sums = Sums([weight], torch.float32)
    find_sums_with(sums)
    assert find_sum(weight) is sums.sums[weight.data_ptr()]
    assert find_sum(torch.randn(2, 2)) is None
    del sums
    gc.collect()
    assert find_sum(weight) is None


@pytest.mark.parametrize('name', ['sum', 'tokens'])
def test_losses_add_to_the_heads_sum(name: str) -> None:
    weight = torch.randn(11, 6, requires_grad=True)
    labels = torch.tensor([3, 0, -100, 10, 7])
    hidden = [torch.randn(5, 6, requires_grad=True) for _ in range(2)]

    def backward() -> None:
        for x in hidden:
            if name == 'sum':
                loss = linear_cross_entropy(x, weight, labels, chunk=2)[0]
            else:
                loss = linear_token_losses(x, weight, labels, chunk=2).sum()
            (loss / 4).backward()

    backward()
    expected, states = weight.grad, [x.grad.clone() for x in hidden]
    weight.grad = None
    sums = Sums([weight], torch.float32)
    find_sums_with(sums)
    for x in hidden:
        x.grad = None
    backward()
    assert weight.grad is None
    torch.testing.assert_close(sums(weight).total, expected)
    for x, want in zip(hidden, states, strict=True):
        torch.testing.assert_close(x.grad, want)
