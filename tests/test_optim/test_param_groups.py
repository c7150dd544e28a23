import pytest
import torch
import torch.distributed as dist
from torch import nn

from internlm_mm.models import InternLM
from internlm_mm.optim import DecayGroupsConstructor, HybridZeroOptimWrapper
from internlm_mm.optim.param_groups import check_same_groups

ADAMW = dict(type=torch.optim.AdamW, lr=1e-3, weight_decay=0.1)


def model() -> nn.Module:
    return InternLM(vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2)


def groups_of(wrapper: HybridZeroOptimWrapper, module: nn.Module) -> list[tuple[float, set[str]]]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [
        (group['weight_decay'], {names[id(parameter)] for parameter in group['params']})
        for group in wrapper.param_groups
    ]


def test_matrices_decay_and_nothing_else() -> None:
    module = model()
    wrapper = DecayGroupsConstructor({'optimizer': dict(ADAMW)})(module)
    assert isinstance(wrapper, HybridZeroOptimWrapper)
    (decay, decaying), (none, plain) = groups_of(wrapper, module)
    assert (decay, none) == (0.1, 0.0)
    projections = [f'self_attn.{p}_proj.weight' for p in 'qkvo']
    projections += [f'mlp.{p}_proj.weight' for p in ('gate', 'up', 'down')]
    assert decaying == {'embed_tokens.weight', 'lm_head.weight'} | {
        f'layers.{layer}.{name}' for layer in '01' for name in projections
    }
    vectors = [f'self_attn.{p}_proj.bias' for p in 'qkvo']
    vectors += ['input_layernorm.weight', 'post_attention_layernorm.weight']
    assert plain == {'norm.weight'} | {
        f'layers.{layer}.{name}' for layer in '01' for name in vectors
    }


def test_frozen_parameters_are_in_no_group() -> None:
    module = model()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == 'lm_head.weight')
    wrapper = DecayGroupsConstructor({'optimizer': dict(ADAMW)})(module)
    assert groups_of(wrapper, module) == [(0.1, {'lm_head.weight'})]


@pytest.mark.parametrize('options', [{}, {'optimizer': None}, {'optimizer': 'AdamW'}])
def test_no_config_of_an_optimizer(options: dict) -> None:
    message = rf'optim_wrapper\.optimizer={options.get("optimizer")!r}: expected dict\(type=AdamW'
    with pytest.raises(ValueError, match=message):
        DecayGroupsConstructor(options)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'lr': -1}, r'^optim_wrapper\.optimizer\.lr=-1 must not be negative$'),
        ({'weight_decay': -1}, r'^optim_wrapper\.optimizer\.weight_decay=-1 must not'),
        ({'eps': -1}, r'^optim_wrapper\.optimizer\.eps=-1 must not be negative$'),
        ({'betas': (0.9, 2)}, r'^optim_wrapper\.optimizer\.betas=\(0\.9, 2\): each must lie in'),
        ({'fused': True, 'foreach': True}, r'^optim_wrapper\.optimizer: `fused` and `foreach` '),
        ({'type': torch.optim.SGD, 'momentum': -1}, r'^optim_wrapper\.optimizer: Invalid momentum'),
        (
            {'type': 'MuonAdamW', 'momentum': 1.5},
            r'^optim_wrapper\.optimizer\.momentum=1\.5 must lie in \[0, 1\)$',
        ),
    ],
)
def test_options_that_an_optimizer_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecayGroupsConstructor({'optimizer': ADAMW | options})(model())


def test_decay_pulls_a_matrix_and_leaves_a_bias() -> None:
    module = nn.Linear(2, 2)
    nn.init.ones_(module.weight)
    nn.init.ones_(module.bias)
    config = {'optimizer': dict(type=torch.optim.AdamW, lr=0.5, weight_decay=0.1)}
    wrapper = DecayGroupsConstructor(config)(module)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    wrapper.step()
    assert torch.equal(module.bias, torch.ones(2))
    torch.testing.assert_close(module.weight.detach(), torch.full((2, 2), 1 - 0.5 * 0.1))


def test_paramwise_cfg_is_refused() -> None:
    with pytest.raises(ValueError, match='paramwise_cfg'):
        DecayGroupsConstructor({'optimizer': dict(ADAMW)}, paramwise_cfg={'norm_decay_mult': 0})


def compare_groups(own: bool) -> str:
    names = ('embedding', 'head')[dist.get_rank() :] if own else ('embedding', 'head')
    groups = [{'params': [], 'lr': len(name)} for name in names]
    try:
        check_same_groups(torch.optim.AdamW(groups, fused=True))
    except ValueError as error:
        return str(error)
    return ''


def test_groups_that_only_some_stages_have_are_refused(two_ranks) -> None:
    assert two_ranks(compare_groups, False) == ['', '']
    for message in two_ranks(compare_groups, True):
        assert 'rank 1 (1) are not those of rank 0 (2)' in message
        assert 'optim_wrapper.constructor' in message
