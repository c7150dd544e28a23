from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode

from internlm_mm.datasets import RandomTokens
from internlm_mm.datasets.packing import collate_rows
from internlm_mm.models import InternLM, InternLM2, InternLM3, Llama, Mistral, Qwen2, Qwen3
from internlm_mm.optim import HybridZeroOptimWrapper
from internlm_mm.parallel.data import (
    GatherAhead,
    allocate,
    begin_micro_batch,
    layers_of,
    shard_model,
)
from internlm_mm.parallel.initialize import initialize_parameters
from internlm_mm.parallel.recompute import recompute_layers


def model(num_layers: int = 3) -> InternLM:
    return InternLM(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=num_layers, num_heads=2
    )


def test_layers_are_found_in_dicts_and_lists() -> None:
    module = model()
    assert list(layers_of(module)) == [module.layers[name] for name in '012']
    listed = nn.Module()
    listed.layers = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    assert list(layers_of(listed)) == list(listed.layers)
    assert list(layers_of(nn.Linear(1, 1))) == []


def test_a_model_that_is_not_sharded_is_left_alone() -> None:
    module = nn.Linear(2, 2)
    before = vars(module).copy()
    begin_micro_batch(module, True, 'step')
    assert vars(module) == before


def placement(reshard: str) -> dict:
    module = model()
    mesh = init_device_mesh('cpu', (2,))
    shard_model(module, mesh, torch.bfloat16, torch.float32, reshard)
    return {
        'units': [name for name, child in module.named_modules() if isinstance(child, FSDPModule)],
        'sharded': all(
            isinstance(p, DTensor) and p.placements == (Shard(0),) for p in module.parameters()
        ),
        'masters': {p.dtype for p in module.parameters()},
    }


def test_every_layer_is_a_unit_and_masters_stay_fp32(two_ranks) -> None:
    for result in two_ranks(placement, 'step'):
        assert result['units'] == ['', 'layers.0', 'layers.1', 'layers.2']
        assert result['sharded']
        assert result['masters'] == {torch.float32}


class Net(nn.Module):
    """Three layers and a head: four units."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(5, 5) for _ in range(3)])
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(generator=generator)


def net(reshard: str, mesh_shape: tuple[int, ...] = (2,), **options: Any) -> Net:
    layers = Net()
    mesh = init_device_mesh(
        'cpu', mesh_shape, mesh_dim_names=('replicate', 'shard')[-len(mesh_shape) :]
    )
    shard_model(layers, mesh, torch.float32, torch.float32, reshard, **options)
    return layers


def collectives(reshard: str, micro_batches: int) -> dict[str, list[int]]:
    """All-gathers and reduce-scatters of each micro-batch."""
    layers = net(reshard)
    counts: dict[str, list[int]] = {'gather': [], 'reduce': []}
    for index in range(micro_batches):
        with CommDebugMode() as counted:
            begin_micro_batch(layers, index == micro_batches - 1, reshard)
            layers(torch.randn(2, 5)).sum().backward()
        counts['gather'].append(count(counted, 'allgather'))
        counts['reduce'].append(count(counted, 'reduce_scatter'))
    return counts


def count(counted: CommDebugMode, kind: str) -> int:
    return sum(n for name, n in counted.get_comm_counts().items() if kind in str(name))


@pytest.mark.parametrize(
    ('reshard', 'gathers'),
    [
        # 4 units. By step: gathered by the first forward, kept until the last backward.
        ('step', [4, 0, 0]),
        # By layer: each layer for forward and for backward, the outermost unit once.
        ('layer', [7, 7, 7]),
    ],
)
def test_communication_of_a_step(two_ranks, reshard: str, gathers: list[int]) -> None:
    for counts in two_ranks(collectives, reshard, 3):
        assert counts['reduce'] == [0, 0, 4]  # gradients once a step
        assert counts['gather'] == gathers


def rows(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step * 2 + torch.distributed.get_rank())
    return torch.randn(4, 5, generator=generator)


def train(reshard: str, mesh_shape: tuple[int, ...], fault: str | None = None, **options) -> dict:
    """Five steps of two micro-batches, with an evaluation, a skipped step and a load in between."""
    module = net(reshard, mesh_shape, **options)
    optim = HybridZeroOptimWrapper(
        torch.optim.AdamW(module.parameters(), lr=0.1), clip_grad={'max_norm': 1.0}
    )
    gather = GatherAhead(module) if reshard == 'never' else None
    if gather is not None and fault != 'begins before the update':
        optim.after_step = gather.start
    if gather is not None and fault == 'begins before the update':
        update = optim.step
        optim.step = lambda **kwargs: (gather.start(), update(**kwargs))
    told: dict[str, list] = {'losses': [], 'evaluated': [], 'norms': [], 'sharded': []}
    first = {name: value.clone() for name, value in module.state_dict().items()}
    for step in range(5):
        for index in range(2):
            begin_micro_batch(module, index == 1, reshard)
            loss = module(rows(2 * step + index)).square().sum()
            (loss * (float('inf') if step == 1 else 1.0)).backward()
            told['losses'].append(loss.item())
        # What hooks see in `after_backward`, and after the step.
        told['sharded'].append(all(isinstance(p.grad, DTensor) for p in module.parameters()))
        told['norms'].append(optim.update_params()['grad_norm'])
        told['sharded'].append(all(isinstance(p, DTensor) for p in module.parameters()))
        if step in (1, 2):
            with torch.no_grad():
                told['evaluated'].append(module(rows(99)).sum().item())
        if step == 3:
            if fault == 'load behind its back':
                for name, parameter in module.named_parameters():
                    parameter.detach().copy_(first[name])
            else:
                module.load_state_dict(first)
    told['weights'] = {k: v.full_tensor() for k, v in module.state_dict().items()}
    if gather is not None:
        gather.drop()
    return told


def assert_same(one: dict, other: dict) -> None:
    for key in one.keys() - {'weights'}:
        assert str(one[key]) == str(other[key]), key  # as text, for NaN
    for name, weight in one['weights'].items():
        assert torch.equal(weight, other['weights'][name]), name


@pytest.mark.parametrize('mesh_shape', [(2,), (2, 1), (1, 2)], ids=str)
def test_gathering_ahead_changes_no_bit(two_ranks, mesh_shape: tuple[int, ...]) -> None:
    for one, other in zip(
        two_ranks(train, 'step', mesh_shape), two_ranks(train, 'never', mesh_shape), strict=True
    ):
        assert all(one['sharded'])
        assert len({*one['evaluated']}) == 2
        assert_same(one, other)


@pytest.mark.parametrize('fault', ['begins before the update', 'load behind its back'])
def test_a_stale_gather_would_show(two_ranks, fault: str) -> None:
    whole, stale = two_ranks(train, 'step', (2,))[0], two_ranks(train, 'never', (2,), fault)[0]
    with pytest.raises(AssertionError):
        assert_same(whole, stale)


def gathers_of_a_step() -> list[int]:
    module = net('never')
    ahead = GatherAhead(module)
    found = []
    for _ in range(2):
        with CommDebugMode() as counted:
            begin_micro_batch(module, True, 'never')
            module(torch.ones(2, 5)).sum().backward()
        found.append(count(counted, 'allgather'))
        with CommDebugMode() as counted:
            ahead.start()
        found.append(count(counted, 'allgather'))
    ahead.drop()
    with CommDebugMode() as counted:
        module(torch.ones(2, 5))
    return [*found, count(counted, 'allgather')]


def test_the_next_forward_finds_everything_gathered(two_ranks) -> None:
    for found in two_ranks(gathers_of_a_step):
        # The first forward gathers for itself, and so does one after `drop`.
        assert found == [4, 4, 0, 4, 4]


def begins_without_the_other() -> bool:
    """Rank 1 begins to gather only when rank 0 has come back from doing so."""
    module = net('never')
    ahead, store = GatherAhead(module), dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        ahead.start()
        store.set('rank 0 went on', '')
    else:
        store.wait(['rank 0 went on'], timedelta(seconds=20))
        ahead.start()
    out = module(torch.ones(2, 5))
    store.delete_key('rank 0 went on')
    ahead.drop()
    return torch.equal(out, Net()(torch.ones(2, 5)))


def test_the_gather_is_on_its_way_while_the_host_goes_on(two_ranks) -> None:
    """The forward, not `start`, is what waits for the other rank's part."""
    assert two_ranks(begins_without_the_other) == [True, True]


def test_gathering_ahead_without_shards_does_nothing() -> None:
    ahead = GatherAhead(Net())
    ahead.start()
    ahead.drop()


@pytest.mark.parametrize('reshard', ['never', 'layer'])
def test_masters_in_host_memory_change_no_bit(two_ranks, reshard: str) -> None:
    """On CPUs nothing moves, but everything else of an offloaded run is as on a GPU."""
    plain, offloaded = (two_ranks(train, reshard, (2,), None, offload=o) for o in (False, True))
    for one, other in zip(plain, offloaded, strict=True):
        assert_same(one, other)


def from_meta(offload: bool) -> dict[str, Tensor]:
    with torch.device('meta'):
        module = Net()
        module.head.register_buffer('table', torch.zeros(2))
    mesh = init_device_mesh('cpu', (2,))
    shard_model(module, mesh, torch.float32, torch.float32, 'step', offload=offload)
    allocate(module, torch.device('cpu'), offload)
    assert not module.head.table.is_meta
    initialize_parameters(module, 3)
    module(torch.ones(2, 5)).sum().backward()
    return {
        name: value.full_tensor()
        for parameter_name, parameter in module.named_parameters()
        for name, value in ((parameter_name, parameter.detach()), ('grad', parameter.grad))
    }


def test_a_model_built_on_meta_starts_alike_with_masters_in_host_memory(two_ranks) -> None:
    for one, other in zip(two_ranks(from_meta, False), two_ranks(from_meta, True), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


FAMILIES: dict[str, tuple[type[nn.Module], dict]] = {
    'InternLM2': (InternLM2, dict(num_kv_heads=2)),
    'InternLM3': (InternLM3, dict(num_kv_heads=1, head_dim=6)),
    'Mistral': (Mistral, dict(num_kv_heads=2)),
    'tied': (Llama, dict(num_kv_heads=2, tie_word_embeddings=True)),
    'Qwen2': (Qwen2, dict(num_kv_heads=2, tie_word_embeddings=True)),
    'Qwen3': (Qwen3, dict(num_kv_heads=2, head_dim=6)),
    'dynamic': (
        Llama,
        dict(
            rope_scaling=dict(rope_type='dynamic', factor=2.0, original_max_position_embeddings=4)
        ),
    ),
}


def family_of(kind: str) -> nn.Module:
    family, options = FAMILIES[kind]
    built = family(
        vocab_size=22,
        hidden_size=16,
        intermediate_size=14,
        num_layers=2,
        num_heads=4,
        max_seq_len=16,
        **options,
    )
    generator = torch.Generator().manual_seed(6)
    for parameter in built.parameters():
        parameter.data.normal_(0.0, 0.4, generator=generator)
    return built.double()


def step_of(built: nn.Module, rows: list[int], micro_batches: int) -> None:
    """Backward of some rows, in several micro-batches."""
    data = RandomTokens(vocab_size=22, seq_len=16, document_lengths=[3, 7], seed=4)
    share = len(rows) // micro_batches
    for index in range(micro_batches):
        begin_micro_batch(built, index == micro_batches - 1, 'step')
        batch = collate_rows([data[row] for row in rows[share * index : share * (index + 1)]])
        built(batch)['loss'].backward()


def sharded_gradients(kind: str, reshard: str, mesh_shape: tuple[int, ...]) -> dict[str, Tensor]:
    built = family_of(kind)
    recompute_layers(built, 0.5)
    mesh = init_device_mesh(
        'cpu', mesh_shape, mesh_dim_names=('replicate', 'shard')[-len(mesh_shape) :]
    )
    shard_model(built, mesh, torch.float64, torch.float64, reshard)
    rank = torch.distributed.get_rank()
    step_of(built, [2 * rank, 2 * rank + 1], micro_batches=2)
    assert set(built.state_dict()) == {name for name, _ in built.named_parameters()}
    return {name: p.grad.full_tensor() for name, p in built.named_parameters()}


@pytest.mark.parametrize(
    ('reshard', 'mesh_shape'), [('step', (2,)), ('layer', (2,)), ('never', (2, 1))], ids=str
)
@pytest.mark.parametrize('kind', FAMILIES)
def test_every_gradient_of_every_family(two_ranks, kind: str, reshard: str, mesh_shape) -> None:
    whole = family_of(kind)
    step_of(whole, [0, 1, 2, 3], micro_batches=1)
    for found in two_ranks(sharded_gradients, kind, reshard, mesh_shape):
        assert found.keys() == {name for name, _ in whole.named_parameters()}
        for name, parameter in whole.named_parameters():
            error = (found[name] - parameter.grad).norm() / parameter.grad.norm()
            assert error < 1e-12, f'{name}: {error:.1e}'
