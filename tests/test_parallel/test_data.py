import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode

from internlm_mm.models import InternLM
from internlm_mm.parallel.data import begin_micro_batch, layers_of, shard_model


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


def collectives(reshard: str, micro_batches: int) -> dict[str, list[int]]:
    """All-gathers and reduce-scatters of each micro-batch."""
    torch.manual_seed(0)
    layers = nn.Module()
    layers.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
    layers.head = nn.Linear(4, 4)
    layers.forward = lambda x: layers.head(layers.layers[2](layers.layers[1](layers.layers[0](x))))
    shard_model(layers, init_device_mesh('cpu', (2,)), torch.float32, torch.float32, reshard)
    counts: dict[str, list[int]] = {'gather': [], 'reduce': []}
    for index in range(micro_batches):
        with CommDebugMode() as counted:
            begin_micro_batch(layers, index == micro_batches - 1, reshard)
            layers(torch.randn(2, 4)).sum().backward()
        called = {str(name): count for name, count in counted.get_comm_counts().items()}
        counts['gather'].append(sum(n for name, n in called.items() if 'allgather' in name))
        counts['reduce'].append(sum(n for name, n in called.items() if 'reduce_scatter' in name))
    return counts


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
