import pytest
import torch

from internlm_mm.ops import LowRank, low_rank_linear, merge_low_rank, row_norms

RANK, IN, OUT = 3, 10, 7


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = dict(
        x=(2, 5, IN), weight=(OUT, IN), bias=(OUT,), down=(RANK, IN), up=(OUT, RANK),
        magnitude=(OUT,),
    )  # fmt: skip
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize('dora', [False, True])
def test_it_is_the_product_with_the_merged_weight(tensors, dora: bool) -> None:
    t = tensors
    change = LowRank(t['down'], t['up'], 0.7, magnitude=t['magnitude'] if dora else None)
    merged = t['weight'] + 0.7 * t['up'] @ t['down']
    if dora:
        # Lengths are constants for the gradient, as the paper has it.
        merged = t['magnitude'].unsqueeze(1) * merged / merged.norm(dim=1, keepdim=True).detach()
    torch.testing.assert_close(merge_low_rank(t['weight'], change), merged, rtol=1e-12, atol=0)
    wanted = t['x'] @ merged.T + t['bias']
    found = low_rank_linear(t['x'], t['weight'], t['bias'], change)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    names = [name for name in t if dora or name != 'magnitude']
    theirs = torch.autograd.grad(wanted.square().sum(), [t[name] for name in names])
    ours = torch.autograd.grad(found.square().sum(), [t[name] for name in names])
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


def test_parts_of_the_columns_add_up(tensors) -> None:
    t = tensors
    change = LowRank(t['down'], t['up'], 0.7, magnitude=t['magnitude'])
    whole = low_rank_linear(t['x'], t['weight'], None, change)
    halves = [slice(0, 4), slice(4, IN)]
    squares = torch.zeros(OUT, dtype=torch.float64)
    for half in halves:
        squares += row_norms(t['weight'][:, half], change._replace(down=t['down'][:, half])) ** 2
    parts = [
        low_rank_linear(
            t['x'][..., half],
            t['weight'][:, half],
            None,
            change._replace(down=t['down'][:, half]),
            add_up=lambda _: squares,
        )
        for half in halves
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-11, atol=1e-11)


def test_no_change_is_the_layer_itself(tensors) -> None:
    t = tensors
    wanted = torch.nn.functional.linear(t['x'], t['weight'], t['bias'])
    assert torch.equal(low_rank_linear(t['x'], t['weight'], t['bias'], None), wanted)


@pytest.mark.parametrize('dora', [False, True])
def test_dropout_hides_inputs_from_the_change_alone(tensors, dora: bool) -> None:
    t = {name: tensor.detach() for name, tensor in tensors.items()}
    magnitude = row_norms(t['weight'], LowRank(t['down'], t['up'], 0.7)) if dora else None
    change = LowRank(t['down'], t['up'], 0.7, 0.5, magnitude)
    torch.manual_seed(3)
    found = low_rank_linear(t['x'], t['weight'], t['bias'], change)
    torch.manual_seed(3)
    given = torch.nn.functional.dropout(t['x'], 0.5)
    wanted = t['x'] @ t['weight'].T + t['bias'] + 0.7 * given @ t['down'].T @ t['up'].T
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_norms_of_half_precision_are_wide(tensors) -> None:
    weight = tensors['weight'].detach().bfloat16()
    assert row_norms(weight).dtype == torch.float32
