"""Products in one against products apart: outputs and the gradient of every parameter."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from internlm_mm.datasets import RandomTokens
from internlm_mm.datasets.packing import collate_rows
from internlm_mm.models import InternLM
from internlm_mm.ops import project
from internlm_mm.parallel.fuse import fuse_linears, project_at_once
from tests.test_parallel.test_strategy import OPTIM, strategy

MODEL = dict(
    type=InternLM, vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4
)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('frozen', [(), (1,), (0, 1, 2)])
def test_outputs_and_gradients(bias: bool, frozen: tuple[int, ...]) -> None:
    layers = nn.ModuleList(nn.Linear(6, n, bias=bias, dtype=torch.float64) for n in (4, 2, 3))
    for index in frozen:
        layers[index].requires_grad_(False)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    inputs = [x, *(p for p in layers.parameters() if p.requires_grad)]
    grads = [torch.randn(2, 5, n, dtype=torch.float64) for n in (4, 2, 3)]
    results = []
    for compute in (project, project_at_once):
        out = compute(x, layers)
        results.append((out, torch.autograd.grad(out, inputs, grads)))
    for expected, found in zip(*results, strict=True):
        for want, one in zip(expected, found, strict=True):
            torch.testing.assert_close(one, want, rtol=1e-12, atol=1e-12)


def test_it_is_one_product() -> None:
    layers = [nn.Linear(6, n) for n in (4, 2)]
    with torch.profiler.profile() as profile:
        project_at_once(torch.randn(3, 6), layers)
    assert sum(event.name == 'aten::addmm' for event in profile.events()) == 1


# Dynamo makes an object of the function's class while it traces.
@pytest.mark.filterwarnings('ignore:.*should not be instantiated:DeprecationWarning')
def test_a_compiled_layer_has_it_in_one_graph() -> None:
    layers = nn.ModuleList(nn.Linear(6, n) for n in (4, 2))
    x = torch.randn(3, 6, requires_grad=True)
    compiled = torch.compile(project_at_once, fullgraph=True, backend='aot_eager')
    for found, expected in zip(compiled(x, layers), project(x, layers), strict=True):
        torch.testing.assert_close(found, expected)
    sum(part.sum() for part in compiled(x, layers)).backward()
    assert layers[1].weight.grad is not None


class Other(nn.Linear):
    pass


def test_layers_that_cannot_be_fused() -> None:
    x = torch.randn(1, 4)
    with pytest.raises(ValueError, match=r'Other is not a plain nn\.Linear'):
        project_at_once(x, [nn.Linear(4, 4), Other(4, 4)])
    with pytest.raises(ValueError, match='all or none of fused layers have biases'):
        project_at_once(x, [nn.Linear(4, 4), nn.Linear(4, 4, bias=False)])
    with pytest.raises(ValueError, match='no layer of Linear has the seam'):
        fuse_linears(nn.Linear(2, 2))


def test_every_layer_of_a_model() -> None:
    module = InternLM(**{k: v for k, v in MODEL.items() if k != 'type'})
    names = list(module.state_dict())
    assert fuse_linears(module) == 4
    assert list(module.state_dict()) == names


def gradients(fuse: bool, parallel: dict, **options) -> tuple[float, dict]:
    made = strategy(kernels=dict(fuse=fuse), parallel=parallel, **options)
    made.prepare(dict(MODEL), optim_wrapper=OPTIM)
    rows = RandomTokens(seq_len=16, vocab_size=64, seed=5)
    batches = [collate_rows([rows[2 * i], rows[2 * i + 1]]) for i in range(4)]
    own = batches[made.data_rank :: made.data_world_size]
    loss = made.forward_backward(own, 128)['loss'].item()
    found = {}
    for name, parameter in made.model.named_parameters():
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return loss, found


@pytest.mark.parametrize(
    ('parallel', 'options'),
    [
        ({'data_shard': 2}, {}),
        ({'data_shard': 2}, {'reshard': 'layer', 'recompute': 1.0}),
        ({'tensor': 2}, {}),
    ],
    ids=['step', 'layer', 'tensor'],
)
def test_gradients_of_every_parameter_on_two_ranks(two_ranks, parallel, options) -> None:
    answers = [two_ranks(gradients, fuse, parallel, **options) for fuse in (False, True)]
    for (loss, expected), (fused, found) in zip(*answers, strict=True):
        assert fused == pytest.approx(loss, rel=1e-6)
        assert found.keys() == expected.keys()
        for name, want in expected.items():
            torch.testing.assert_close(found[name], want, rtol=1e-5, atol=1e-6, msg=name)
