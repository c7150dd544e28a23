from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from internlm_mm.optim.grad_norm import ROW, gradient_norm
from tests.layouts import place, random_tensors
from tests.ranks import Ranks

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
    assert norm.dtype == torch.float64
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    assert norm.item() == pytest.approx(norm_of_all(tensors), rel=tolerance)


def test_half_precision_does_not_overflow() -> None:
    tensors = [torch.full((64,), 3e4, dtype=torch.float16)]
    assert gradient_norm(tensors).item() == pytest.approx(3e4 * 8, rel=1e-3)


def test_small_gradients_do_not_vanish_in_a_sum_of_many() -> None:
    tensors = [torch.full((1000, 1000), 1e-4), torch.full((10,), 1.0)]
    assert gradient_norm(tensors).item() == pytest.approx(norm_of_all(tensors), rel=1e-5)


@pytest.mark.parametrize('numbers', [ROW - 1, ROW, 3 * ROW + 5, 50_000_000])
def test_a_large_tensor_in_host_memory(numbers: int) -> None:
    """A CPU's own sum in fp32 loses 0.3 % and more of the largest."""
    tensor = torch.randn(numbers, generator=torch.Generator().manual_seed(2))
    assert gradient_norm([tensor]).item() == pytest.approx(norm_of_all([tensor]), rel=1e-6)


def test_rows_that_do_not_follow_one_another() -> None:
    whole = torch.randn(300, 200)
    norm = gradient_norm([whole.t(), whole[:, ::3]])
    assert norm.item() == pytest.approx(norm_of_all([whole, whole[:, ::3]]), rel=1e-6)


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


def test_one_collective_for_each_axis(two_ranks) -> None:
    for calls in two_ranks(collectives_of_a_norm):
        assert calls == 1


def collectives_of_a_norm() -> int:
    tensors = place(SHAPED, (1, 2, 1), {}).values()
    with mock.patch.object(dist, 'all_reduce', wraps=dist.all_reduce) as reduced:
        gradient_norm(tensors)
    return reduced.call_count


SHAPED = random_tensors({str(index): shape for index, shape in enumerate(SHAPES)})
# Sharded on the dimension that FSDP2 cuts, too, which makes strided shards; on another; not at all.
PLAN = {'0': Shard(0), '1': Shard(0), '2': Shard(1), '3': Shard(1), '5': Shard(0)}


def norm_on(degrees: tuple[int, int, int]) -> dict:
    placed = place(SHAPED, degrees, PLAN)
    kinds = {type(p).__name__ for t in placed.values() for p in t.placements}
    with mock.patch.object(dist, 'all_reduce', wraps=dist.all_reduce) as reduced:
        norm = gradient_norm(placed.values()).item()
    return {'norm': norm, 'kinds': kinds, 'calls': reduced.call_count}


@pytest.fixture(scope='module')
def four_ranks(tmp_path_factory: pytest.TempPathFactory):
    ranks = Ranks(tmp_path_factory.mktemp('four'), world_size=4)
    yield ranks
    ranks.close()


@pytest.mark.parametrize(
    'degrees', [(1, 1, 2), pytest.param((1, 2, 1), id='shard'), (2, 1, 1)], ids=str
)
def test_one_axis_of_fsdp2(two_ranks, degrees: tuple[int, int, int]) -> None:
    check_norms(two_ranks(norm_on, degrees), degrees)


@pytest.mark.slow
@pytest.mark.parametrize(
    'degrees', [(1, 2, 2), (2, 2, 1), (2, 1, 2), (1, 4, 1), (1, 1, 4)], ids=str
)
def test_two_axes_of_fsdp2(four_ranks: Ranks, degrees: tuple[int, int, int]) -> None:
    check_norms(four_ranks(norm_on, degrees), degrees)


def check_norms(found: list[dict], degrees: tuple[int, int, int]) -> None:
    expected = norm_of_all(list(SHAPED.values()))
    assert len({one['norm'] for one in found}) == 1  # to the last bit
    assert found[0]['norm'] == pytest.approx(expected, rel=1e-6)
    assert ('_StridedShard' in found[0]['kinds']) == (degrees[2] > 1)
    assert found[0]['calls'] == (degrees[1] > 1) + (degrees[2] > 1)


def norm_of_stages(degrees: tuple[int, int], bad: float | None = None) -> float:
    """A pipeline of two stages, each of which shards its own half of the parameters."""
    stages, shards = degrees
    mesh = init_device_mesh('cpu', (stages, shards), mesh_dim_names=('pipeline', 'shard'))
    stage = mesh.get_local_rank('pipeline')
    mine = [whole for index, whole in enumerate(SHAPED.values()) if index % stages == stage]
    placed = [distribute_tensor(whole, mesh['shard'], [Shard(0)]) for whole in mine]
    if bad is not None and dist.get_rank() == dist.get_world_size() - 1:
        placed[0].to_local()[0] = bad
    return gradient_norm(placed, (mesh.get_group('pipeline'),)).item()


def test_stages_of_a_pipeline_are_added_up(two_ranks) -> None:
    expected = norm_of_all(list(SHAPED.values()))
    first, second = two_ranks(norm_of_stages, (2, 1))
    assert first == second == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_stages_that_are_sharded(four_ranks: Ranks) -> None:
    found = four_ranks(norm_of_stages, (2, 2))
    assert len(set(found)) == 1
    assert found[0] == pytest.approx(norm_of_all(list(SHAPED.values())), rel=1e-6)
    for norm in four_ranks(norm_of_stages, (2, 2), float('nan')):
        assert not norm < float('inf')


def contribution() -> Tensor:
    """What this rank gives to the collective."""
    placed = place(SHAPED, (1, 2, 1), {})
    with mock.patch.object(dist, 'all_reduce') as reduced:
        gradient_norm(placed.values())
    return reduced.call_args.args[0]


def test_the_order_in_which_a_backend_sums_cannot_matter(two_ranks) -> None:
    """Replicas on machines of other kinds would drift apart. Sums with zeros are exact."""
    first, second = two_ranks(contribution)
    assert first.count_nonzero() and second.count_nonzero()
    assert not ((first != 0) & (second != 0)).any()
