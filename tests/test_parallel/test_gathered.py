import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from internlm_mm.parallel.data import begin_micro_batch, shard_model
from internlm_mm.parallel.gathered import gathered


def layered() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Module()
    module.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
    module.head = nn.Linear(4, 3)
    module.forward = lambda x: module.head(module.layers[1](module.layers[0](x)))
    return module


def test_a_model_that_is_not_sharded_gathers_nothing() -> None:
    module = layered()
    module.forward(torch.ones(1, 4)).sum().backward()
    assert list(gathered(module)) == []


def held_on_a_rank() -> dict:
    module = layered()
    expected = layered()
    shard_model(module, init_device_mesh('cpu', (2,)), torch.float32, torch.float32, 'step')
    names = sorted(name for name, _ in module.named_parameters())
    before = [entry.name for entry in gathered(module)]
    begin_micro_batch(module, False, 'step')
    module(torch.ones(1, 4)).sum().backward()
    expected.forward(torch.ones(1, 4)).sum().backward()
    between = {
        entry.name: (
            torch.equal(entry.parameter, expected.get_parameter(entry.name)),
            torch.allclose(entry.gradient, expected.get_parameter(entry.name).grad),
        )
        for entry in gathered(module)
    }
    begin_micro_batch(module, True, 'step')
    module(torch.ones(1, 4)).sum().backward()
    after = {
        entry.name: (entry.parameter.untyped_storage().nbytes(), entry.gradient)
        for entry in gathered(module)
    }
    return {'names': names, 'before': before, 'between': between, 'after': after}


def test_between_micro_batches_all_is_there_and_afterwards_nothing(two_ranks) -> None:
    for held in two_ranks(held_on_a_rank):
        assert held['before'] == []
        assert sorted(held['between']) == held['names']
        assert set(held['between'].values()) == {(True, True)}
        assert set(held['after'].values()) == {(0, None)}
