"""What FSDP2 holds besides its shards, on a mesh of one rank."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from internlm_mm.parallel.data import begin_micro_batch, shard_model
from internlm_mm.parallel.gathered import _Add, add_waiting_with, gathered


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


def test_micro_batches_are_added_by_a_function_of_ours(process_group: None) -> None:
    """Bit by bit as FSDP2 adds them."""
    mesh = init_device_mesh('cpu', (1,), mesh_dim_names=('data_shard',))
    gradients, added = {}, []

    def add(total: Tensor, gradient: Tensor) -> None:
        added.append((total.dtype, gradient.dtype))
        total += gradient

    for ours in (False, True):
        torch.manual_seed(0)
        model = Net()
        shard_model(model, mesh, torch.bfloat16, torch.float32, 'step')
        if ours:
            assert add_waiting_with(model, add) == 4
        for index in range(3):
            begin_micro_batch(model, index == 2, 'step')
            model(torch.randn(3, 4, dtype=torch.bfloat16)).backward()
        gradients[ours] = [p.grad.to_local() for p in model.parameters()]
    assert all(map(torch.equal, gradients[False], gradients[True]))
    # Of the three micro-batches the first begins the sums.
    assert added == [(torch.float32, torch.bfloat16)] * 2 * 4


def test_what_cannot_be_added_plainly_is_left_to_fsdp2() -> None:
    class Entry:
        unsharded_accumulated_grad: Tensor | None = torch.zeros(2, 3)

        def __init__(self) -> None:
            self.unsharded_param = nn.Parameter(torch.zeros(2, 3))
            self.unsharded_param.grad = torch.ones(3, 2).T

        def accumulate_unsharded_grad_if_needed(self) -> None:
            self.by_fsdp2 = True

    entry = Entry()
    _Add(entry, lambda *_: pytest.fail('not contiguous'))()
    assert entry.by_fsdp2
