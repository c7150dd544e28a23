"""The order of techniques, and what each leaves of a model."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from internlm_mm.models import InternLM
from internlm_mm.parallel import place
from internlm_mm.parallel.float8 import Float8
from internlm_mm.parallel.mesh import Layout, ParallelMesh
from internlm_mm.parallel.place import Techniques, place_model
from tests.strategies import strategy

SIZES = dict(
    vocab_size=24, hidden_size=16, intermediate_size=20, num_layers=4, num_heads=2, max_seq_len=16
)
CPU = torch.device('cpu')


def meta_model(**changes) -> InternLM:
    with torch.device('meta'):
        return InternLM(**(SIZES | changes))


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def recomputes(model: nn.Module) -> list[bool]:
    return ['forward' in vars(layer) for layer in model.layers.values()]


def test_an_exchange_that_is_unknown_is_refused_also_where_none_is_made() -> None:
    message = r"strategy\.context_attention='rng'.*'ring'"
    with pytest.raises(ValueError, match=message):
        Techniques(context_attention='rng')
    with pytest.raises(ValueError, match=message):
        strategy(context_attention='rng')
    assert Techniques(context_attention='ring').context_attention == 'ring'


def test_a_model_alone_is_left_as_it_is() -> None:
    model = meta_model()
    placed = place_model(model, Layout(), 0, None, Techniques(), CPU)
    assert placed.model is model and placed.stages == {0: model} and placed.plan is None
    assert placed.attention.startswith('sdpa: ')
    assert all(type(p) is nn.Parameter and p.is_meta for p in model.parameters())
    assert recomputes(model) == [False] * 4
    assert not dist.is_initialized()


@pytest.mark.parametrize('schedule', ['1f1b', 'interleaved_1f1b', 'zbv_zero_bubble'])
def test_every_rank_of_a_pipeline_without_a_process(schedule: str) -> None:
    names, found = names_of(meta_model()), []
    for rank in range(4):
        layout = Layout(pipeline=2, data_shard=2)
        techniques = Techniques(pipeline={'schedule': schedule}, param_dtype=torch.float64)
        placed = place_model(meta_model(), layout, rank, None, techniques, CPU)
        here = rank // 2  # the pipeline is the outermost axis
        assert list(placed.stages) == placed.plan.stages_of(here)
        assert all(p.is_meta for p in placed.model.parameters())
        assert {p.dtype for p in placed.model.parameters()} == {torch.float64}
        parts = [p for stage in placed.stages.values() for p in stage.parameters()]
        assert {id(p) for p in parts} == {id(p) for p in placed.model.parameters()}
        found += names_of(placed.model)
    assert sorted(found) == sorted(names * 2)
    assert not dist.is_initialized()


def test_everything_at_once_on_the_meta_device(one_rank) -> None:
    model = meta_model()
    names, shapes = names_of(model), [p.shape for p in model.parameters()]
    techniques = Techniques(
        param_dtype=torch.bfloat16, recompute=0.5, compile=True, attention='reference'
    )
    layout = Layout()
    placed = place_model(model, layout, 0, ParallelMesh(layout, 'cpu'), techniques, CPU)
    assert names_of(placed.model) == names  # no technique leaves a prefix behind
    assert [p.shape for p in placed.model.parameters()] == shapes
    assert all(isinstance(p, DTensor) and p.is_meta for p in placed.model.parameters())
    assert {p.dtype for p in placed.model.parameters()} == {torch.float32}  # the masters
    assert isinstance(placed.model, FSDPModule)
    layers = list(placed.model.layers.values())
    assert all(isinstance(layer, FSDPModule) for layer in layers)
    assert all(layer._compiled_call_impl is not None for layer in layers)
    assert recomputes(placed.model) == [True, True, False, False]
    assert placed.attention == 'reference: named in the config'


def test_float64_has_masters_in_float64(one_rank) -> None:
    layout, techniques = Layout(), Techniques(param_dtype=torch.float64)
    mesh = ParallelMesh(layout, 'cpu')
    placed = place_model(meta_model(), layout, 0, mesh, techniques, CPU)
    assert {p.dtype for p in placed.model.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({'schedule': '1f1b', 'layers': [1, 3]}, [[True], [True, True, False]]),
        ({'schedule': '1f1b'}, [[True, False], [True, False]]),
    ],
    ids=str,
)
def test_each_stage_recomputes_its_share(options: dict, expected: list) -> None:
    techniques = Techniques(recompute=0.5, pipeline=options)
    for rank in range(2):
        placed = place_model(meta_model(), Layout(pipeline=2), rank, None, techniques, CPU)
        assert recomputes(placed.model) == expected[rank]


def place_and_note(parallel: dict, schedule: str) -> tuple[list[str], dict]:
    """On two ranks: who was called in which order, and what the parameters are in the end."""
    order: list[str] = []
    patch = pytest.MonkeyPatch()

    def note(name: str) -> None:
        original = getattr(place, name)

        def call(*args, **kwargs):
            order.append(name)
            return original(*args, **kwargs)

        patch.setattr(place, name, call)

    for name in ('cut_stages', 'apply_tensor_parallel', 'apply_attention', 'apply_kernels'):
        note(name)
    note('recompute_layers')
    note('shard_model')
    float8 = None if 'tensor' in parallel else Float8()
    patch.setattr(place, 'apply_float8', lambda *args: order.append('apply_float8') or 'all')

    def compiled(self, *args, **kwargs):
        order.append('compile')

    patch.setattr(nn.Module, 'compile', compiled)
    try:
        layout = Layout(**parallel)
        techniques = Techniques(
            recompute=1.0,
            compile=True,
            float8=float8,
            pipeline={'schedule': schedule},
            reshard='layer',
        )
        mesh = ParallelMesh(layout, 'cpu')
        placed = place_model(meta_model(), layout, dist.get_rank(), mesh, techniques, CPU)
    finally:
        patch.undo()
    parameters = {
        name: (tuple(p.shape), p.device_mesh.mesh_dim_names, [str(x) for x in p.placements])
        for name, p in placed.model.named_parameters()
    }
    return order, parameters


STAGE = ['apply_attention', 'apply_kernels', 'recompute_layers']
ROUNDED = [*STAGE, 'apply_float8']


def test_the_order_of_a_pipeline(two_ranks) -> None:
    names = []
    for order, parameters in two_ranks(place_and_note, {'pipeline': 2}, 'interleaved_1f1b'):
        assert order == ['cut_stages', *(2 * [*ROUNDED, 'compile', 'shard_model'])]
        assert {mesh for _, mesh, _ in parameters.values()} == {('shard',)}
        names += parameters
    assert sorted(names) == sorted(names_of(meta_model()))


def test_the_order_of_tensor_parallelism(two_ranks) -> None:
    for order, parameters in two_ranks(place_and_note, {'tensor': 2}, '1f1b'):
        assert order == ['apply_tensor_parallel', *STAGE, *(4 * ['compile']), 'shard_model']
        expected = {name: tuple(p.shape) for name, p in meta_model().named_parameters()}
        assert {name: shape for name, (shape, _, _) in parameters.items()} == expected
        assert {mesh for _, mesh, _ in parameters.values()} == {('shard', 'tensor')}
        _, _, placements = parameters['layers.3.mlp.down_proj.weight']
        assert placements == ['S(0)', 'S(1)']


def test_context_shares_parameters_like_data(two_ranks) -> None:
    for order, parameters in two_ranks(place_and_note, {'context': 2}, '1f1b'):
        assert order == [*ROUNDED, *(4 * ['compile']), 'shard_model']
        for _, mesh, placements in parameters.values():
            assert mesh == ('shard',) and placements == ['S(0)']


@pytest.mark.parametrize(
    ('layout', 'techniques', 'message'),
    [
        (Layout(), Techniques(recompute=1.5), r'strategy\.recompute=1\.5'),
        (Layout(), Techniques(attention='spda'), "'spda' is unknown"),
        (
            Layout(pipeline=2),
            Techniques(reshard='layer', pipeline={'schedule': 'zbv_zero_bubble'}),
            r"reshard='layer' .*'zbv_zero_bubble'",
        ),
    ],
)
def test_errors_of_techniques(layout: Layout, techniques: Techniques, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place_model(meta_model(), layout, 0, None, techniques, CPU)


@pytest.mark.parametrize(
    ('world_size', 'options', 'needed'),
    [
        (1, {}, False),
        (1, {'param_dtype': torch.float64}, False),
        (1, {'param_dtype': torch.bfloat16}, True),
        (1, {'offload': True}, True),
        (2, {}, True),
    ],
)
def test_one_process_that_has_nothing_to_do_for_fsdp_needs_no_mesh(
    world_size: int, options: dict, needed: bool
) -> None:
    assert Techniques(**options).needs_mesh(world_size) is needed
