"""Matrices whole at their owners, against slices of the whole that every rank knows."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from internlm_mm.optim.whole_matrices import Matrix, MatrixDeal
from internlm_mm.utils.shards import local_tensor, part_of
from tests.ranks import Ranks

SHAPES = [(6, 4), (5, 3), (1, 7), (3, 3), (8, 2)]
CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def four_ranks(tmp_path_factory: pytest.TempPathFactory):
    ranks = Ranks(tmp_path_factory.mktemp('ranks'), 4)
    yield ranks
    ranks.close()


def wholes(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def cut(whole: Tensor, mesh_shape: tuple[int, ...], placements: tuple) -> DTensor:
    mesh = init_device_mesh('cpu', mesh_shape)
    part = part_of(tuple(whole.shape), placements, mesh_shape, tuple(mesh.get_coordinate()))
    return DTensor.from_local(
        whole[part.slices].clone(),
        mesh,
        placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def there_and_back(mesh_shape: tuple, placements: tuple, dtype: torch.dtype, count: int) -> tuple:
    """Whether all was right, which matrices this rank owned, and the numbers it sent."""
    whole = wholes(dtype)[:count]
    tensors = [cut(one, mesh_shape, placements) for one in whole]
    deal = MatrixDeal(tensors[0], dtype, CPU)
    matrices = [Matrix(number, tuple(one.shape)) for number, one in enumerate(whole)]
    local = [local_tensor(one) for one in tensors]
    sent, swap = [], dist.all_to_all_single

    def counted(received: Tensor, given: Tensor, *args, **options):
        here = deal.here[deal._groups.index(options['group'])]
        sent.append(given.numel() - args[1][here])  # without what stays
        return swap(received, given, *args, **options)

    dist.all_to_all_single = counted
    try:
        found = deal.gather(matrices, local).wait()
        right = all(torch.equal(found[number], whole[number]) for number in found)
        back = deal.scatter(matrices, {number: 2 * one for number, one in found.items()})
    finally:
        dist.all_to_all_single = swap
    right &= all(torch.equal(one, 2 * own) for one, own in zip(back, local, strict=True))
    return right, sorted(found), sum(sent), sum(own.numel() for own in local)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('placement', [Shard(0), Shard(1)], ids=str)
def test_two_ranks_share(two_ranks, dtype: torch.dtype, placement) -> None:
    ranks = two_ranks(there_and_back, (2,), (placement,), dtype, len(SHAPES))
    assert all(right for right, *_ in ranks)
    assert [owned for _, owned, *_ in ranks] == [[0, 2, 4], [1, 3]]
    sent, held = (sum(rank[i] for rank in ranks) for i in (2, 3))
    numel = [rows * columns for rows, columns in SHAPES]
    assert held == sum(numel)
    assert sent < 2 * held  # to the owner and back, without what the owner has itself


def test_a_matrix_less_than_ranks(two_ranks) -> None:
    ranks = two_ranks(there_and_back, (2,), (Shard(0),), torch.float32, 1)
    assert [rank[:2] for rank in ranks] == [(True, [0]), (True, [])]


def test_copies_send_nothing(two_ranks) -> None:
    ranks = two_ranks(there_and_back, (2,), (Replicate(),), torch.float32, len(SHAPES))
    assert [rank[:3] for rank in ranks] == [(True, [0, 1, 2, 3, 4], 0)] * 2


STRIDED = _StridedShard(0, split_factor=2)


@pytest.mark.parametrize(
    ('placements', 'owned'),
    [
        ((Shard(0), Shard(1)), [[0, 4], [1], [2], [3]]),
        ((STRIDED, Shard(0)), [[0, 4], [1], [2], [3]]),
        ((Replicate(), Shard(0)), [[0, 2, 4], [1, 3]] * 2),
    ],
    ids=str,
)
def test_two_axes(four_ranks: Ranks, placements: tuple, owned: list) -> None:
    ranks = four_ranks(there_and_back, (2, 2), placements, torch.float32, len(SHAPES))
    assert all(right for right, *_ in ranks)
    assert [rank[1] for rank in ranks] == owned


def test_three_matrices_on_two_axes(four_ranks: Ranks) -> None:
    """Ranks that own nothing, and that pass nothing on."""
    for count in (1, 2, 3):
        ranks = four_ranks(there_and_back, (2, 2), (Shard(0), Shard(1)), torch.float32, count)
        assert [rank[:2] for rank in ranks] == [
            (True, [rank] if rank < count else []) for rank in range(4)
        ]


def test_one_process_works_alone() -> None:
    whole = wholes(torch.float32)
    deal = MatrixDeal(whole[0], torch.float32, CPU)
    matrices = [Matrix(number, tuple(one.shape)) for number, one in enumerate(whole)]
    found = deal.gather(matrices, whole).wait()
    assert deal.ranks == 1 and sorted(found) == [0, 1, 2, 3, 4]
    back = deal.scatter(matrices, {number: one.T.contiguous().T for number, one in found.items()})
    for one, two in zip(back, whole, strict=True):
        assert torch.equal(one, two)


def uneven_fsdp() -> bool:
    """Parts as torch cuts them are those that are reckoned with."""
    mesh = init_device_mesh('cpu', (2,))
    tensors = [distribute_tensor(one, mesh, [Shard(0)]) for one in wholes(torch.float32)]
    deal = MatrixDeal(tensors[0], torch.float32, CPU)
    return all(
        deal.parts(tuple(one.shape))[deal.here].sizes == tuple(one.to_local().shape)
        or not one.to_local().numel()
        for one in tensors
    )


def test_parts_are_torchs(two_ranks) -> None:
    assert two_ranks(uneven_fsdp) == [True, True]
