import pytest

from internlm_mm.parallel.mesh import AXES, Layout, build_mesh, resolve_layout


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
        ({'data_shard': 3}, 8, r'needs a multiple of 3 processes \(exactly that many\).*are 8'),
        ({'data_replicate': 3, 'data_shard': -1}, 8, 'needs a multiple of 3 processes, but .* 8'),
        ({'data_shard': 16}, 8, r'Nearest: parallel=dict\(data_replicate=1, data_shard=8\)'),
        ({'data_replicate': -1, 'data_shard': -1}, 8, 'only one axis may be -1'),
        ({'data_shards': 8}, 8, "axis 'data_shards' is unknown.*data_shard"),
        ({'tensor': 2}, 8, "axis 'tensor' is unknown"),
        ({'data_shard': 0}, 8, 'data_shard=0'),
        ({'data_shard': -2}, 8, 'data_shard=-2'),
        ({'data_shard': 2.0}, 8, r'data_shard=2\.0'),
        ({'data_shard': 'all'}, 8, "data_shard='all'"),
    ],
)
def test_errors_name_the_numbers(parallel: dict, world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_layout(parallel, world_size, world_size)


def axes_of(replicate: int, shard: int) -> tuple:
    mesh = build_mesh(Layout(replicate, shard), 'cpu')
    return mesh.mesh_dim_names, tuple(mesh.shape), mesh.get_coordinate()


@pytest.mark.parametrize(('replicate', 'shard'), [(1, 2), (2, 1)])
def test_the_mesh_has_all_axes(two_ranks, replicate: int, shard: int) -> None:
    for rank, (names, shape, place) in enumerate(two_ranks(axes_of, replicate, shard)):
        assert names == AXES
        assert shape == (replicate, shard)
        assert list(place) == ([0, rank] if shard == 2 else [rank, 0])
