"""What FSDP2 holds besides its shards, on a mesh of one rank."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from internlm_mm.parallel.data import begin_micro_batch, shard_model
from internlm_mm.parallel.gathered import gathered


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({'0': nn.Linear(4, 4), '1': nn.Linear(4, 2)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers['1'](self.layers['0'](x)).sum()


def held(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Bytes of each whole parameter and of its waiting gradient."""
    return {
        one.name: (
            one.parameter.untyped_storage().nbytes(),
            0 if one.gradient is None else one.gradient.untyped_storage().nbytes(),
        )
        for one in gathered(model)
    }


@pytest.mark.parametrize('reshard', ['step', 'layer'])
def test_a_step_of_two_micro_batches(reshard: str, process_group: None) -> None:
    model = Net()
    names = {name for name, _ in model.named_parameters()}
    mesh = init_device_mesh('cpu', (1,), mesh_dim_names=('data_shard',))
    shard_model(model, mesh, torch.bfloat16, torch.float32, reshard)
    assert held(model) == {}  # nothing was ever gathered
    x = torch.randn(3, 4, dtype=torch.bfloat16)

    begin_micro_batch(model, False, reshard)
    loss = model(x)
    assert set(held(model)) == names
    kept = {name: 0 if reshard == 'layer' else size for name, size in SIZES.items()}
    assert held(model) == {name: (2 * size, 0) for name, size in kept.items()}
    loss.backward()
    assert {name: sizes[1] for name, sizes in held(model).items()} == {
        name: 4 * size for name, size in SIZES.items()
    }  # in float32, whole, until the last micro-batch

    begin_micro_batch(model, True, reshard)
    model(x).backward()
    assert set(held(model).values()) == {(0, 0)}


SIZES = {'layers.0.weight': 16, 'layers.0.bias': 4, 'layers.1.weight': 8, 'layers.1.bias': 2}


def test_other_models_have_nothing_gathered() -> None:
    assert list(gathered(Net())) == []
