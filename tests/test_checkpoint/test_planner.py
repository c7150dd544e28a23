"""Checkpoints move between layouts, bit by bit, whatever the sizes."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from internlm_mm.checkpoint.checkpointer import Checkpointer
from internlm_mm.checkpoint.planner import local_part, part_of
from internlm_mm.checkpoint.storage import StoredTensors, read_tensor_index
from internlm_mm.utils.shards import local_tensor
from tests.layouts import place, random_tensors
from tests.ranks import Ranks

# Sizes that no layout halves evenly, some smaller than the number of ranks.
SHAPES = {
    'model.both': (7, 3), 'model.vector': (5,), 'model.columns': (3, 6), 'model.middle': (2, 4, 2),
    'model.one': (1,), 'model.even': (16, 16), 'model.odd': (9, 2), 'model.alone': (11, 3),
    'model.empty': (0, 3),
}  # fmt: skip
PLAN = {
    'model.both': Shard(0), 'model.vector': Shard(0), 'model.columns': Shard(1),
    'model.middle': Shard(1), 'model.even': Shard(0), 'model.odd': Shard(0),
    'model.one': Replicate(),
}  # fmt: skip
DTYPES = {'model.odd': torch.bfloat16, 'model.one': torch.float64}


def wholes() -> dict[str, Tensor]:
    found = random_tensors(SHAPES)
    return {name: value.to(DTYPES.get(name, torch.float32)) for name, value in found.items()}


def state(degrees: tuple[int, int, int], fill: bool = True) -> dict[str, Tensor]:
    """What one rank passes: weights, a moment of each, a count that every rank has, its own."""
    weights = {name: whole if fill else whole * 0 - 1 for name, whole in wholes().items()}
    tensors = place(weights, degrees, PLAN)
    for name in SHAPES:
        moment = torch.zeros_like(tensors[name], dtype=torch.float32)
        local_tensor(moment).copy_(local_tensor(tensors[name]) * 2)
        tensors[name.replace('model', 'optimizer') + '.exp_avg'] = moment
        tensors[name.replace('model', 'optimizer') + '.step'] = torch.tensor(4.0 if fill else 0.0)
    rank = dist.get_rank() if dist.is_initialized() else 0
    tensors[f'rng.{rank}.torch'] = torch.full((8,), rank if fill else 99, dtype=torch.uint8)
    return tensors


def save(path: Path, degrees: tuple[int, int, int], async_save: bool = False) -> None:
    checkpointer = Checkpointer(async_save)
    checkpointer.save(path, state(degrees), {})
    checkpointer.finish()


def load(path: Path, degrees: tuple[int, int, int]) -> int:
    """Returns how many bytes this rank compared, each of them equal."""
    found, expected = state(degrees, fill=False), state(degrees)
    stored = read_tensor_index(path)
    for name in [name for name in found if name.startswith('rng') and name not in stored]:
        del found[name]  # more ranks than those that saved
    Checkpointer().load(path, found)
    for name, value in found.items():
        assert local_tensor(value).dtype == local_tensor(expected[name]).dtype
        assert torch.equal(local_tensor(value), local_tensor(expected[name])), name
    return sum(local_tensor(value).nbytes for value in found.values())


def check_stored(path: Path) -> None:
    """Read whole, without any process group; everything is there once."""
    stored = StoredTensors(path)
    for name, whole in wholes().items():
        moment = name.replace('model', 'optimizer')
        assert stored[name].dtype == whole.dtype
        assert torch.equal(stored[name], whole), name
        assert torch.equal(stored[f'{moment}.exp_avg'], whole.float() * 2), name
        assert stored[f'{moment}.step'] == 4.0
    for name, entry in read_tensor_index(path).items():
        volume = sum(torch.Size(chunk['sizes']).numel() for chunk in entry['chunks'])
        assert volume == torch.Size(entry['shape']).numel(), name
        keys = [(chunk['file'], chunk['key']) for chunk in entry['chunks']]
        assert len(set(keys)) == len(keys)
    size = sum(json.loads((path / 'manifest.json').read_text())['files'][file.name]['size']
               for file in path.glob('shard_*'))  # fmt: skip
    assert size < 1.2 * sum(value.nbytes for value in stored.values()) + 20000  # headers


@pytest.fixture(scope='module')
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path_factory.mktemp('four'), world_size=4)
    yield ranks
    ranks.close()


TWO = [(1, 2, 1), (2, 1, 1), (1, 1, 2)]
FOUR = [(1, 2, 2), (1, 4, 1), (2, 2, 1), (1, 1, 4), (2, 1, 2)]


@pytest.mark.parametrize('degrees', TWO, ids=str)
def test_two_ranks(two_ranks, tmp_path: Path, degrees: tuple[int, int, int]) -> None:
    two_ranks(save, tmp_path / 'iter_1', degrees, async_save=True)
    check_stored(tmp_path / 'iter_1')
    for other in TWO:
        assert all(two_ranks(load, tmp_path / 'iter_1', other))


@pytest.mark.slow
@pytest.mark.parametrize('degrees', FOUR, ids=str)
def test_four_ranks(
    four_ranks: Ranks, two_ranks, tmp_path: Path, degrees: tuple[int, int, int]
) -> None:
    four_ranks(save, tmp_path / 'iter_1', degrees, async_save=True)
    check_stored(tmp_path / 'iter_1')
    for other in FOUR:
        assert all(four_ranks(load, tmp_path / 'iter_1', other))
    for other in TWO:
        assert all(two_ranks(load, tmp_path / 'iter_1', other))
    two_ranks(save, tmp_path / 'iter_2', TWO[0])
    assert all(four_ranks(load, tmp_path / 'iter_2', degrees))


def saved_stage(path: Path, stages: int) -> None:
    """Each stage passes its own names, sharded over the stage's ranks."""
    shards = dist.get_world_size() // stages
    mesh = init_device_mesh('cpu', (stages, shards), mesh_dim_names=('pipeline', 'shard'))
    checkpointer = Checkpointer()
    checkpointer.save(path, stage_of(mesh, stages), {'rank': dist.get_rank()})
    checkpointer.finish()


def stage_of(mesh, stages: int, fill: bool = True) -> dict[str, Tensor]:
    mine = mesh.get_local_rank('pipeline')
    own = [name for index, name in enumerate(SHAPES) if index * stages // len(SHAPES) == mine]
    tensors = {}
    for name in own:
        whole = wholes()[name]
        value = whole if fill else whole * 0 - 1
        moment = name.replace('model', 'optimizer')
        tensors[name] = distribute_tensor(value, mesh['shard'], [Shard(0)])
        tensors[f'{moment}.exp_avg'] = distribute_tensor(
            value.float() * 2, mesh['shard'], [Shard(0)]
        )
        tensors[f'{moment}.step'] = torch.tensor(4.0 if fill else 0.0)
    return tensors


def loaded_stage(path: Path, stages: int) -> list[str]:
    shards = dist.get_world_size() // stages
    mesh = init_device_mesh('cpu', (stages, shards), mesh_dim_names=('pipeline', 'shard'))
    found = stage_of(mesh, stages, fill=False)
    Checkpointer().load(path, found)
    for name, value in stage_of(mesh, stages).items():
        assert torch.equal(local_tensor(found[name]), local_tensor(value)), name
    return list(found)


def test_stages_of_a_pipeline_save_their_own(two_ranks, tmp_path: Path) -> None:
    two_ranks(saved_stage, tmp_path / 'iter_1', 2)
    check_stored(tmp_path / 'iter_1')
    first, second = two_ranks(loaded_stage, tmp_path / 'iter_1', 2)
    assert not set(first) & set(second)
    two_ranks(loaded_stage, tmp_path / 'iter_1', 1)


@pytest.mark.slow
def test_stages_that_are_sharded(four_ranks: Ranks, two_ranks, tmp_path: Path) -> None:
    four_ranks(saved_stage, tmp_path / 'iter_1', 2)
    check_stored(tmp_path / 'iter_1')
    four_ranks(loaded_stage, tmp_path / 'iter_1', 4)
    two_ranks(loaded_stage, tmp_path / 'iter_1', 2)


# ------------------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize(('shards', 'tensors'), [(4, 2), (2, 4), (3, 3), (8, 2), (5, 1)])
def test_parts_are_those_of_cutting_twice_by_hand(shards: int, tensors: int) -> None:
    """Also on larger meshes: tensor parallelism cuts first, FSDP2 what is left."""
    placements = (_StridedShard(0, split_factor=tensors), Shard(0))
    for size in range(1, 40):
        whole = torch.arange(size)
        covered = []
        for shard, tensor in itertools.product(range(shards), range(tensors)):
            once = torch.chunk(whole, tensors)
            half = once[tensor] if tensor < len(once) else whole[:0]
            twice = torch.chunk(half, shards) if len(half) else ()
            expected = twice[shard].tolist() if shard < len(twice) else []
            (start,), (length,) = part_of((size,), placements, (shards, tensors), (shard, tensor))
            assert list(range(start, start + length)) == expected
            covered += expected
        assert sorted(covered) == whole.tolist()


def test_replicas_and_two_dimensions() -> None:
    placements = (Replicate(), Shard(1), Shard(0))
    assert part_of((5, 7), placements, (2, 2, 3), (1, 1, 2)) == ((4, 4), (1, 3))
    assert part_of((5, 7), placements, (2, 2, 3), (0, 0, 0)) == ((0, 0), (2, 4))
    assert part_of((), (Replicate(),), (4,), (3,)) == ((), ())


def test_what_is_not_reduced_cannot_be_stored() -> None:
    with pytest.raises(ValueError, match='not reduced yet'):
        part_of((4,), (Partial(),), (2,), (0,))


def shape_that_lies() -> str:
    mesh = init_device_mesh('cpu', (2,))
    tensor = DTensor.from_local(
        torch.ones(4 - dist.get_rank()), mesh, [Shard(0)], run_check=False,
        shape=torch.Size((9,)), stride=(1,),
    )  # fmt: skip
    try:
        local_part('model.w', tensor)
    except ValueError as error:
        return str(error)
    return 'nothing was raised'


def test_data_that_does_not_fit_its_layout_is_refused(two_ranks) -> None:
    for message in two_ranks(shape_that_lies):
        assert message.startswith('model.w: [9]') and 'but it holds' in message
