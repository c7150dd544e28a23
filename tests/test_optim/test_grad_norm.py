import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from internlm_mm.optim.grad_norm import gradient_norm

SHAPES = [(7, 3), (5,), (1, 4), (2, 3, 2), (1,), (16, 16)]  # 2 ranks: uneven and empty shards


def gradients(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [
        (10.0**index * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        for index, shape in enumerate(SHAPES)
    ]


def norm_of_all(tensors: list[Tensor]) -> float:
    return torch.cat([tensor.double().reshape(-1) for tensor in tensors]).norm().item()


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_plain_gradients(dtype: torch.dtype) -> None:
    tensors = gradients(dtype)
    norm = gradient_norm(tensors)
    assert norm.shape == ()
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    assert norm.item() == pytest.approx(norm_of_all(tensors), rel=tolerance)


def test_half_precision_does_not_overflow() -> None:
    tensors = [torch.full((64,), 3e4, dtype=torch.float16)]
    assert gradient_norm(tensors).item() == pytest.approx(3e4 * 8, rel=1e-3)


def test_small_gradients_do_not_vanish_in_a_sum_of_many() -> None:
    tensors = [torch.full((1000, 1000), 1e-4), torch.full((10,), 1.0)]
    assert gradient_norm(tensors).item() == pytest.approx(norm_of_all(tensors), rel=1e-5)


@pytest.mark.parametrize('bad', [float('inf'), float('nan')])
def test_one_bad_number_shows(bad: float) -> None:
    tensors = gradients()
    tensors[2][0, 1] = bad
    assert not gradient_norm(tensors).isfinite()


def test_no_gradient_at_all() -> None:
    with pytest.raises(ValueError, match='no gradient'):
        gradient_norm([])


def norms_on_ranks(dtype: torch.dtype) -> dict[str, float]:
    whole = gradients(dtype)
    line = init_device_mesh('cpu', (2,), mesh_dim_names=('data_shard',))
    grid = init_device_mesh('cpu', (2, 1), mesh_dim_names=('data_replicate', 'data_shard'))
    other = init_device_mesh('cpu', (1, 2), mesh_dim_names=('data_replicate', 'data_shard'))

    def lay(mesh, *placements) -> list[Tensor]:
        return [distribute_tensor(tensor, mesh, placements) for tensor in whole]

    sharded, replicated = lay(line, Shard(0)), lay(line, Replicate())
    hybrid = lay(grid, Replicate(), Shard(0))
    layouts = {
        'sharded': sharded,
        'replicated': replicated,
        'replicate axis of 2': hybrid,
        'shard axis of 2': lay(other, Replicate(), Shard(0)),
        'mixed meshes': [sharded[0], replicated[1], whole[2], hybrid[3], whole[4], sharded[5]],
        'last dimension': [distribute_tensor(t, line, [Shard(t.ndim - 1)]) for t in whole],
    }
    assert any(tensor.to_local().numel() == 0 for tensor in sharded) == (dist.get_rank() == 1)
    return {name: gradient_norm(tensors).item() for name, tensors in layouts.items()}


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_any_layout_gives_the_norm_of_the_whole(two_ranks, dtype: torch.dtype) -> None:
    expected = norm_of_all(gradients(dtype))
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    first, second = two_ranks(norms_on_ranks, dtype)
    assert len(first) == 6
    for name, value in first.items():
        assert value == pytest.approx(expected, rel=tolerance), name
    assert first == second  # all ranks must decide alike


def only_one_rank_is_bad(bad: float) -> float:
    line = init_device_mesh('cpu', (2,))
    tensors = [distribute_tensor(tensor, line, [Shard(0)]) for tensor in gradients()]
    if dist.get_rank() == 1:
        tensors[0].to_local()[0, 0] = bad
    return gradient_norm(tensors).item()


@pytest.mark.parametrize('bad', [float('inf'), float('nan')])
def test_a_bad_number_on_one_rank_shows_on_all(two_ranks, bad: float) -> None:
    for norm in two_ranks(only_one_rank_is_bad, bad):
        assert not norm < float('inf')


def unreduced() -> str:
    line = init_device_mesh('cpu', (2,))
    tensor = torch.distributed.tensor.DTensor.from_local(torch.ones(2), line, [Partial()])
    try:
        gradient_norm([tensor])
    except ValueError as error:
        return str(error)
    return 'nothing was raised'


def test_a_gradient_that_is_not_reduced_is_refused(two_ranks) -> None:
    for message in two_ranks(unreduced):
        assert 'not reduced yet' in message
