import pytest

from internlm_mm.parallel.mesh import (
    AXES,
    Layout,
    ParallelMesh,
    largest_divisor,
    nearest_layout,
    resolve_layout,
)


@pytest.mark.parametrize(
    ('parallel', 'world_size', 'local_size', 'replicate', 'shard'),
    [
        (None, 1, 1, 1, 1),
        ({}, 8, 8, 1, 8),
        ({}, 16, 8, 2, 8),  # sharded in the machine, replicated across machines
        ({}, 1024, 8, 128, 8),
        ({}, 12, 8, 1, 12),  # machines of 8 and 4: no group of equal machines
        ({'data_shard': -1}, 6, 2, 1, 6),
        ({'data_replicate': -1}, 6, 2, 6, 1),
        ({'data_replicate': 1, 'data_shard': -1}, 8, 8, 1, 8),
        ({'data_replicate': -1, 'data_shard': 4}, 16, 8, 4, 4),
        ({'data_replicate': 2, 'data_shard': -1}, 16, 8, 2, 8),
        ({'data_shard': 4}, 4, 8, 1, 4),
        ({'data_replicate': 2, 'data_shard': 4}, 8, 8, 2, 4),
    ],
)
def test_degrees(parallel, world_size: int, local_size: int, replicate: int, shard: int) -> None:
    layout = resolve_layout(parallel, world_size, local_size)
    assert layout == Layout(data_replicate=replicate, data_shard=shard)
    assert layout.data == world_size


@pytest.mark.parametrize(
    ('parallel', 'world_size', 'message'),
    [
        ({'data_shard': 3}, 8, 'needs exactly 3 processes, but there are 8'),
        ({'data_shard': 2, 'tensor': 2}, 8, 'needs exactly 4 processes, but there are 8'),
        ({'pipeline': 3}, 8, 'needs a multiple of 3 processes, but there are 8'),
        ({'data_replicate': 3, 'data_shard': -1}, 8, 'needs a multiple of 3 processes, but .* 8'),
        ({'data_shard': 16}, 8, r'Nearest: parallel=dict\(data_shard=8\)'),
        ({'tensor': 3}, 8, r'Nearest: parallel=dict\(data_shard=4, tensor=2\)'),
        ({'pipeline': 5, 'tensor': 2}, 8, r'Nearest: parallel=dict\(pipeline=4, tensor=2\)'),
        ({'tensor': 4, 'context': 4}, 8, r'Nearest: parallel=dict\(context=2, tensor=4\)'),
        ({'data_replicate': -1, 'data_shard': -1}, 8, 'only one axis may be -1'),
        ({'data_shards': 8}, 8, "axis 'data_shards' is unknown.*data_shard"),
        ({'tensors': 2}, 8, "axis 'tensors' is unknown.*tensor"),
        ({'data_shard': 0}, 8, 'data_shard=0'),
        ({'data_shard': -2}, 8, 'data_shard=-2'),
        ({'data_shard': 2.0}, 8, r'data_shard=2\.0'),
        ({'data_shard': 'all'}, 8, "data_shard='all'"),
    ],
)
def test_errors_name_the_numbers(parallel: dict, world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_layout(parallel, world_size, world_size)


@pytest.mark.parametrize(
    ('parallel', 'world_size', 'local_size', 'expected'),
    [
        ({'tensor': 2}, 8, 8, Layout(data_shard=4, tensor=2)),
        ({'tensor': 8}, 64, 8, Layout(data_shard=1, data_replicate=8, tensor=8)),
        (
            {'pipeline': 4, 'tensor': 2}, 64, 8,
            Layout(pipeline=4, data_shard=4, data_replicate=2, tensor=2),
        ),
        ({'context': 2, 'data_replicate': -1}, 8, 8, Layout(data_replicate=4, context=2)),
        (
            {'pipeline': 2, 'data_shard': 8, 'data_replicate': -1, 'context': 1, 'tensor': 2},
            1024, 8, Layout(pipeline=2, data_shard=8, data_replicate=32, tensor=2),
        ),
    ],
)  # fmt: skip
def test_axes_of_the_model(parallel, world_size: int, local_size: int, expected: Layout) -> None:
    layout = resolve_layout(parallel, world_size, local_size)
    assert layout == expected
    assert layout.world_size == world_size


def test_coordinates_and_ranks() -> None:
    layout = Layout(pipeline=2, data_replicate=3, data_shard=2, context=2, tensor=2)
    for rank in range(layout.world_size):
        place = layout.coordinate(rank)
        assert tuple(place) == AXES
        assert layout.rank(**place) == rank
        assert layout.data_rank(rank) == place['data_replicate'] * 2 + place['data_shard']
    assert layout.coordinate(1)['tensor'] == 1  # neighbours share matrices,
    assert layout.coordinate(layout.world_size // 2)['pipeline'] == 1  # the halves hold stages


def test_layouts_print_as_configs_have_them() -> None:
    assert str(Layout(pipeline=2, tensor=4)) == 'dict(pipeline=2, tensor=4)'
    assert str(Layout()) == 'dict(data_shard=1)'


@pytest.mark.parametrize('world_size', [1, 6, 7, 8, 24, 1024])
@pytest.mark.parametrize('tensor', [1, 3, 8])
@pytest.mark.parametrize('pipeline', [1, 2, 5])
def test_the_nearest_layout_has_all_ranks(world_size: int, tensor: int, pipeline: int) -> None:
    layout = nearest_layout({'tensor': tensor, 'pipeline': pipeline}, world_size, 8)
    assert layout.world_size == world_size
    assert layout.tensor <= tensor and layout.pipeline <= pipeline


def test_largest_divisor() -> None:
    assert [largest_divisor(12, limit) for limit in (0, 1, 5, 7, 12, 20)] == [1, 1, 4, 6, 12, 12]


def axes_of(**degrees: int) -> tuple:
    mesh = ParallelMesh(Layout(**degrees), 'cpu')
    parts = [mesh.fsdp, mesh.pipeline, mesh.context, mesh.tensor]
    return [
        part and (part.mesh_dim_names, tuple(part.shape), list(part.get_coordinate() or ()))
        for part in parts
    ]


def shard_two() -> list:
    return axes_of(data_shard=2)


def replicate_two() -> list:
    return axes_of(data_replicate=2)


def context_two() -> list:
    return axes_of(context=2)


def tensor_two() -> list:
    return axes_of(tensor=2)


def pipeline_two() -> list:
    return axes_of(pipeline=2)


def test_meshes(two_ranks) -> None:
    alone = (('shard',), (1,), [0])
    for rank in range(2):
        both = (('shard',), (2,), [rank])
        assert two_ranks(shard_two)[rank] == [both, None, None, None]
        copies = (('data_replicate', 'shard'), (2, 1), [rank, 0])
        assert two_ranks(replicate_two)[rank] == [copies, None, None, None]
        # The context's ranks share the parameters' shards.
        assert two_ranks(context_two)[rank] == [both, None, (('context',), (2,), [rank]), None]
        assert two_ranks(tensor_two)[rank] == [alone, None, None, (('tensor',), (2,), [rank])]
        assert two_ranks(pipeline_two)[rank] == [alone, (('pipeline',), (2,), [rank]), None, None]
