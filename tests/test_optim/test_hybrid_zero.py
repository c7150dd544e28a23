import copy
import json

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from internlm_mm.optim import HybridZeroOptimWrapper

MAX_NORM = 0.5
ADAMW = dict(lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Shapes that 2 ranks cannot halve: uneven rows, and a row for one of them only."""
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 1)).to(dtype)


def inputs(step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(4, 6, generator=generator, dtype=torch.float64).to(dtype)


def loss_of(module: nn.Module, rows: Tensor) -> Tensor:
    return module(rows).square().sum() * 3


def plain_training(module: nn.Module, steps: int) -> list[float]:
    """torch alone: clip_grad_norm_ and AdamW."""
    optimizer = torch.optim.AdamW(module.parameters(), **ADAMW)
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(module, inputs(step, next(module.parameters()).dtype)).backward()
        norms.append(nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM).item())
        optimizer.step()
    return norms


def wrapper_of(module: nn.Module, **options) -> HybridZeroOptimWrapper:
    options.setdefault('clip_grad', {'max_norm': MAX_NORM})
    return HybridZeroOptimWrapper(torch.optim.AdamW(module.parameters(), **ADAMW), **options)


def assert_same_weights(first: nn.Module, second: nn.Module, tolerance: float) -> None:
    ours, theirs = dict(first.named_parameters()), dict(second.named_parameters())
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_is_torch_clip_and_adamw() -> None:
    ours, theirs = network(), network()
    expected = plain_training(theirs, 5)
    assert all(norm > MAX_NORM for norm in expected[:3])  # the clip bites
    optim = wrapper_of(ours)
    for step, norm in enumerate(expected):
        outputs = optim.update_params(loss_of(ours, inputs(step)))
        assert outputs == {
            'grad_norm': pytest.approx(norm, rel=1e-12),
            'skipped': 0,
            'num_skipped': 0,
        }
        assert all(parameter.grad is None for parameter in ours.parameters())
    assert_same_weights(ours, theirs, 1e-12)


def test_a_small_gradient_is_not_clipped_up() -> None:
    ours, theirs = network(), network()
    optim = wrapper_of(ours, clip_grad={'max_norm': 1e9})
    loss_of(ours, inputs(0)).backward()
    before = [parameter.grad.clone() for parameter in ours.parameters()]
    seen = []
    optim.step = lambda: seen.extend(p.grad.clone() for p in ours.parameters())
    optim.update_params()
    for one, two in zip(before, seen, strict=True):
        assert torch.equal(one, two)
    assert_same_weights(ours, theirs, 0)  # step was replaced


def test_without_clip_grad_the_norm_is_still_told() -> None:
    module = network()
    loss_of(module, inputs(0)).backward()
    expected = torch.cat([p.grad.reshape(-1) for p in module.parameters()]).norm().item()
    outputs = wrapper_of(module, clip_grad=None).update_params()
    assert outputs['grad_norm'] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('bad', [float('inf'), float('nan'), float('-inf')])
def test_a_step_that_is_not_finite_changes_nothing(bad: float) -> None:
    module = network()
    optim = wrapper_of(module)
    optim.update_params(loss_of(module, inputs(0)))
    weights = copy.deepcopy(module.state_dict())
    state = copy.deepcopy(optim.optimizer.state_dict())
    loss_of(module, inputs(1)).backward()
    module[2].bias.grad[1] = bad
    outputs = optim.update_params()
    assert (outputs['skipped'], outputs['num_skipped']) == (1, 1)
    assert not outputs['grad_norm'] < float('inf')
    for name, value in module.state_dict().items():
        assert torch.equal(value, weights[name]), name
    for key, values in optim.optimizer.state_dict()['state'].items():
        for name, value in values.items():
            assert torch.equal(value, state['state'][key][name]), (key, name)
    assert all(parameter.grad is None for parameter in module.parameters())
    outputs = optim.update_params(loss_of(module, inputs(2)))
    assert (outputs['skipped'], outputs['num_skipped']) == (0, 1)


def test_skip_nonfinite_off_raises() -> None:
    module = network()
    optim = wrapper_of(module, skip_nonfinite=False)
    with pytest.raises(FloatingPointError, match='skip_nonfinite=False'):
        optim.update_params(loss_of(module, inputs(0)) * float('nan'))


@pytest.mark.parametrize('loss_scale', [{'initial': 2.0**12}, 2.0**12])
def test_the_loss_scale_does_not_change_the_update(loss_scale) -> None:
    """A power of two: only exponents change, so the weights are equal to the last bit."""
    scaled, plain = network(torch.float32), network(torch.float32)
    with_scale, without = wrapper_of(scaled, loss_scale=loss_scale), wrapper_of(plain)
    for step in range(3):
        rows = inputs(step, torch.float32)
        one = with_scale.update_params(loss_of(scaled, rows))
        two = without.update_params(loss_of(plain, rows))
        assert one.pop('loss_scale') == 2.0**12
        assert one == two
    # The factor of the clip is applied together with the scale's, which rounds once, not twice.
    assert_same_weights(scaled, plain, 1e-7)


def test_overflow_lowers_the_scale_and_is_reported() -> None:
    module = network()
    optim = wrapper_of(module, loss_scale={'initial': 8.0, 'hysteresis': 1, 'growth_interval': 2})
    scales = []
    for factor in (1.0, float('nan'), 1.0, 1.0, 1.0):
        outputs = optim.update_params(loss_of(module, inputs(0)) * factor)
        scales.append(outputs['loss_scale'])
    assert scales == [8.0, 8.0, 4.0, 4.0, 8.0]
    assert optim.num_skipped == 1


def test_a_fixed_scale_never_moves() -> None:
    module = network()
    optim = wrapper_of(module, loss_scale=128)
    for _ in range(3):
        optim.update_params(loss_of(module, inputs(0)) * float('inf'))
    assert optim.update_params(loss_of(module, inputs(0)))['loss_scale'] == 128


def test_scalar_state_is_json_and_comes_back() -> None:
    module = network()
    scale = {'initial': 8.0, 'growth_interval': 3}
    optim = wrapper_of(module, loss_scale=scale)
    optim.update_params(loss_of(module, inputs(0)))
    optim.update_params(loss_of(module, inputs(0)) * float('nan'))
    optim.param_groups[0]['lr'] = 0.005
    optim.param_groups[0]['betas'] = (0.9, 0.99)
    state = json.loads(json.dumps(optim.scalar_state()))

    other = wrapper_of(network(), loss_scale=scale)
    other.load_scalar_state(state)
    assert other.num_skipped == 1
    assert other.loss_scale.state_dict() == optim.loss_scale.state_dict()
    assert other.param_groups[0]['lr'] == 0.01  # the config's, unless a schedule carries it
    other.load_scalar_state(state, scheduled=['lr', 'betas'])
    assert other.param_groups[0]['lr'] == 0.005
    assert other.param_groups[0]['betas'] == (0.9, 0.99)


def test_another_number_of_groups_is_refused() -> None:
    module = network()
    state = wrapper_of(module).scalar_state()
    groups = [{'params': [parameter]} for parameter in module.parameters()]
    other = HybridZeroOptimWrapper(torch.optim.SGD(groups, lr=1.0))
    with pytest.raises(ValueError, match='has 1 parameter groups, this run 6'):
        other.load_scalar_state(state)


@pytest.mark.parametrize(
    'clip_grad', [{'max_norm': 0}, {'max_norm': -1.0}, {'max_nrom': 1.0}, {'max_norm': 1.0, 'p': 2}]
)
def test_bad_clip_grad(clip_grad: dict) -> None:
    with pytest.raises(ValueError, match='expected dict'):
        wrapper_of(network(), clip_grad=clip_grad)


def test_unknown_option_of_the_loss_scale() -> None:
    with pytest.raises(ValueError, match=r"initail=4\.0 is unknown\. Did you mean 'initial'"):
        wrapper_of(network(), loss_scale={'initail': 4.0})


# ------------------------------------------------------------------------------- on two ranks


def sharded_training(steps: int, bad_rank: int | None) -> dict:
    """Some parameters sharded, one layer replicated by hand, one sharded into nothing on rank 1."""
    module = network()
    mesh = init_device_mesh('cpu', (2,))
    fully_shard(module[0], mesh=mesh)
    module[0].set_gradient_divide_factor(1.0)
    fully_shard(module[3], mesh=mesh)  # one row: rank 1 holds nothing of it
    module[3].set_gradient_divide_factor(1.0)
    optim = wrapper_of(module)
    half = slice(0, 1) if dist.get_rank() == 0 else slice(1, 4)
    norms, skipped = [], []
    for step in range(steps):
        loss_of(module, inputs(step)[half]).backward()
        for parameter in module[2].parameters():
            dist.all_reduce(parameter.grad)
        if step == 1 and dist.get_rank() == bad_rank:
            module[0].weight.grad.to_local()[0, 0] = float('nan')
        outputs = optim.update_params()
        norms.append(outputs['grad_norm'])
        skipped.append(outputs['skipped'])
    weights = {}
    for name, parameter in module.named_parameters():
        value = parameter.detach()
        weights[name] = value.full_tensor() if hasattr(value, 'full_tensor') else value
    return {'norms': norms, 'skipped': skipped, 'weights': weights}


def test_sharded_replicated_and_empty_parameters_train_as_on_one_process(two_ranks) -> None:
    whole = network()
    expected = plain_training(whole, 4)
    first, second = two_ranks(sharded_training, 4, None)
    assert first['norms'] == pytest.approx(expected, rel=1e-12)
    assert first['norms'] == second['norms']
    for name, parameter in whole.named_parameters():
        for result in (first, second):
            torch.testing.assert_close(
                result['weights'][name], parameter.detach(), rtol=1e-11, atol=1e-13
            )


@pytest.mark.parametrize('bad_rank', [0, 1])
def test_nan_on_one_rank_skips_on_both(two_ranks, bad_rank: int) -> None:
    first, second = two_ranks(sharded_training, 3, bad_rank)
    assert first['skipped'] == second['skipped'] == [0, 1, 0]
    # A step that is skipped on every rank leaves what two clean steps leave.
    module = network()
    optimizer = torch.optim.AdamW(module.parameters(), **ADAMW)
    for step in (0, 2):
        optimizer.zero_grad()
        loss_of(module, inputs(step)).backward()
        nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM)
        optimizer.step()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(
            first['weights'][name], parameter.detach(), rtol=1e-11, atol=1e-13
        )
        assert torch.equal(first['weights'][name], second['weights'][name])


def test_after_step_sees_new_weights_and_skipped_steps() -> None:
    module = network()
    optim = wrapper_of(module)
    seen = []
    optim.after_step = lambda: seen.append(module[0].weight.detach().clone())
    before = module[0].weight.detach().clone()
    optim.update_params(loss_of(module, inputs(0)))
    optim.update_params(loss_of(module, inputs(1)) * float('inf'))
    assert len(seen) == 2
    assert not torch.equal(seen[0], before)
    assert torch.equal(seen[0], module[0].weight) and torch.equal(seen[1], seen[0])


def stages(bad_step: int) -> dict:
    """Two stages of a pipeline under fp16's loss scale; only the second sees an overflow."""
    torch.manual_seed(dist.get_rank())
    module = nn.Linear(3, 2)
    optim = wrapper_of(module, loss_scale={'initial': 8.0, 'hysteresis': 2, 'growth_interval': 2})
    optim.norm_groups = (dist.group.WORLD,)
    told = []
    for step in range(bad_step + 5):
        bad = dist.get_rank() == 1 and step in (bad_step, bad_step + 1)
        factor = float('inf') if bad else 1.0
        told.append(optim.update_params(module(torch.ones(2, 3)).square().sum() * factor))
    return {'told': told, 'weights': [p.detach().clone() for p in module.parameters()]}


def test_an_overflow_in_one_stage_is_one_in_all(two_ranks) -> None:
    first, second = two_ranks(stages, 1)
    assert str(first['told']) == str(second['told'])
    assert [step['skipped'] for step in first['told']] == [0, 1, 1, 0, 0, 0]
    # Forgiven once, lowered at the second, raised after two finite steps.
    assert [step['loss_scale'] for step in first['told']] == [8, 8, 8, 4, 4, 8]
    assert not any(map(torch.equal, first['weights'], second['weights']))
