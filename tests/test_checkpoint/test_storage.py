import json
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from internlm_mm.checkpoint.disk import write_file
from internlm_mm.checkpoint.storage import (
    METADATA_FILE,
    SafetensorsReader,
    SafetensorsWriter,
    StoredTensors,
    read_tensor_index,
    write_safetensors,
)

pytestmark = pytest.mark.filterwarnings('ignore:torch.distributed is disabled')

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip
SHAPES = [(), (0,), (1,), (3, 0, 2), (5,), (4, 3), (2, 3, 4)]


def some(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 100).to(dtype)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def everything() -> dict[str, Tensor]:
    tensors = {}
    for index, dtype in enumerate(DTYPES):
        for shape in SHAPES:
            tensors[f'{dtype}.{shape}'] = some(shape, dtype, index)
    base = some((6, 8), torch.float32)
    tensors |= {'transposed': base.T, 'slice': base[1:4, ::2], 'row': base[2]}
    tensors['not finite'] = torch.tensor([float('nan'), float('inf'), -0.0])
    return tensors


def save(path: Path, tensors: dict[str, Tensor], no_dist: bool = True, **options) -> None:
    planner = DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(
        tensors, storage_writer=SafetensorsWriter(path, **options), planner=planner, no_dist=no_dist
    )


def load(path: Path, tensors: dict[str, Tensor]) -> None:
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    dcp.load(tensors, storage_reader=SafetensorsReader(path), planner=planner, no_dist=True)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert bits(found[name]) == bits(value), name


# ------------------------------------------------------------------------------ files


def test_the_safetensors_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = everything()
    size, checksum = write_safetensors(tmp_path / 'x.safetensors', tensors.items())
    content = (tmp_path / 'x.safetensors').read_bytes()
    assert (size, checksum) == (len(content), zlib.crc32(content))
    assert_equal(load_file(tmp_path / 'x.safetensors'), tensors)


def test_the_data_begins_aligned(tmp_path: Path) -> None:
    for length in range(1, 20):
        write_safetensors(tmp_path / 'x', [('n' * length, torch.ones(1))])
        header = int.from_bytes((tmp_path / 'x').read_bytes()[:8], 'little')
        assert (8 + header) % 8 == 0


# ------------------------------------------------------------------------- one process


def test_round_trip_of_every_dtype_and_shape(tmp_path: Path) -> None:
    tensors = everything()
    save(tmp_path / 'c', tensors)
    found = {name: torch.zeros_like(value) for name, value in tensors.items()}
    load(tmp_path / 'c', found)
    assert_equal(found, tensors)


def test_files_of_a_checkpoint(tmp_path: Path) -> None:
    announced = {}
    save(tmp_path / 'c', {'a': torch.ones(2, 3)}, on_finish=announced.update)
    assert {path.name for path in (tmp_path / 'c').iterdir()} == {
        'shard_0.safetensors',
        METADATA_FILE,
    }
    for name, (size, checksum) in announced.items():
        content = (tmp_path / 'c' / name).read_bytes()
        assert (size, checksum) == (len(content), zlib.crc32(content))
    assert json.loads((tmp_path / 'c' / METADATA_FILE).read_text()) == {
        'version': 1,
        'tensors': {
            'a': {
                'dtype': 'float32',
                'shape': [2, 3],
                'chunks': [
                    {'offsets': [0, 0], 'sizes': [2, 3], 'file': 'shard_0.safetensors', 'key': 'a'}
                ],
            }
        },
    }


def test_only_tensors_are_stored(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException, match=r'step: only tensors are stored.*state\.json'):
        save(tmp_path / 'c', {'a': torch.ones(2), 'step': 3})


def test_stored_tensors_are_read_one_by_one(tmp_path: Path, monkeypatch) -> None:
    tensors = {f'model.{name}': value for name, value in everything().items()}
    save(tmp_path / 'c', {**tensors, 'rng.0': torch.ones(3)})
    opened = []

    def counting(path, framework):
        opened.append(Path(path).name)
        return safe_open(path, framework=framework)

    monkeypatch.setattr('internlm_mm.checkpoint.storage.safe_open', counting)
    stored = StoredTensors(tmp_path / 'c', prefix='model.')
    assert len(stored) == len(tensors)
    assert 'rng.0' not in stored
    assert stored.shape('transposed') == (8, 6)
    assert opened == []  # names and shapes need no shard
    assert torch.equal(stored['row'], tensors['model.row'])
    assert opened == ['shard_0.safetensors']
    assert_equal(dict(stored), everything())
    with pytest.raises(KeyError, match='absent'):
        stored['absent']


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'is not a checkpoint: it has no metadata\.json'):
        read_tensor_index(tmp_path)
    assert not SafetensorsReader.validate_checkpoint_id(tmp_path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    write_file(tmp_path / METADATA_FILE, json.dumps({'version': 2, 'tensors': {}}).encode())
    with pytest.raises(ValueError, match='format version 2 is newer than 1'):
        read_tensor_index(tmp_path)


# --------------------------------------------------------------------------- two ranks

LAYOUTS = {
    'sharded': ((2,), [Shard(0)]),
    'columns': ((2,), [Shard(1)]),
    'replicated': ((2,), [Replicate()]),
    'hybrid, shard axis of 1': ((2, 1), [Replicate(), Shard(0)]),
    'hybrid, shard axis of 2': ((1, 2), [Replicate(), Shard(0)]),
}


def matrices() -> dict[str, Tensor]:
    """Even, uneven, and rows for one rank only; in a dtype that rounds and one that does not."""
    shapes = [(4, 4), (5, 3), (1, 6), (7, 2)]
    return {
        f'{dtype}.{shape}': some(shape, dtype, seed)
        for seed, shape in enumerate(shapes)
        for dtype in (torch.float32, torch.bfloat16)
    }


def laid_out(tensors: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh('cpu', shape)
    return {name: distribute_tensor(value, mesh, placements) for name, value in tensors.items()}


def save_on_ranks(path: Path, layout: str) -> None:
    save(path, laid_out(matrices(), layout), no_dist=False)


def load_on_ranks(path: Path, layout: str) -> dict[str, Tensor]:
    zeros = {name: torch.zeros_like(value) for name, value in matrices().items()}
    tensors = laid_out(zeros, layout)
    load(path, tensors)
    return {name: value.full_tensor() for name, value in tensors.items()}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_two_ranks_save_and_one_process_loads(two_ranks, tmp_path: Path, layout: str) -> None:
    two_ranks(save_on_ranks, tmp_path / 'c', layout)
    found = {name: torch.zeros_like(value) for name, value in matrices().items()}
    load(tmp_path / 'c', found)
    assert_equal(found, matrices())
    assert_equal(dict(StoredTensors(tmp_path / 'c')), matrices())


@pytest.mark.parametrize('layout', LAYOUTS)
def test_one_process_saves_and_two_ranks_load(two_ranks, tmp_path: Path, layout: str) -> None:
    save(tmp_path / 'c', matrices())
    for found in two_ranks(load_on_ranks, tmp_path / 'c', layout):
        assert_equal(found, matrices())


def test_from_one_layout_of_two_ranks_to_another(two_ranks, tmp_path: Path) -> None:
    two_ranks(save_on_ranks, tmp_path / 'c', 'sharded')
    for found in two_ranks(load_on_ranks, tmp_path / 'c', 'columns'):
        assert_equal(found, matrices())


def test_everything_is_stored_once(two_ranks, tmp_path: Path) -> None:
    """Replicas are not written twice, and each rank writes its share."""
    total = sum(value.nbytes for value in matrices().values())
    for layout in LAYOUTS:
        path = tmp_path / layout
        two_ranks(save_on_ranks, path, layout)
        sizes = {}
        for shard in path.glob('*.safetensors'):
            sizes[shard.name] = sum(value.nbytes for value in load_file(shard).values())
        assert sum(sizes.values()) == total, layout
        assert sorted(sizes) == ['shard_0.safetensors', 'shard_1.safetensors'], layout
