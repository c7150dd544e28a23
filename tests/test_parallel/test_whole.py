"""Whole copies of sharded models."""

import pytest
import torch
from torch import nn

from internlm_mm.models import InternLM
from internlm_mm.parallel.adapters import adapted_layers
from internlm_mm.parallel.whole import copy_whole
from internlm_mm.registry import MODELS
from tests.helpers import tiny_runner

CPU = torch.device('cpu')


def copied(folder, parallel: dict, dtype: str) -> dict[str, torch.Tensor]:
    precision = dict(param=dtype, reduce='float32')
    runner = tiny_runner(folder, strategy__parallel=parallel, strategy__precision=precision)
    runner.val()
    said = {key: value for key, value in runner.cfg.model.items() if key != 'type'}
    with torch.device('meta'):
        target = InternLM(**said)
    copy = copy_whole(runner.model, target, CPU, getattr(torch, dtype))
    assert copy is target and not copy.training
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    return dict(copy.named_parameters())


@pytest.mark.parametrize('axis', ['data_shard', 'tensor', 'context'])
def test_equals_the_weights_of_one_process(two_ranks, tmp_path, axis: str) -> None:
    runner = tiny_runner(tmp_path / 'one')
    runner.val()
    expected = dict(runner.model.named_parameters())
    for found in two_ranks(copied, tmp_path / 'two', {axis: 2}, 'float32'):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert torch.equal(value, expected[name]), name
    if axis == 'data_shard':
        for value in two_ranks(copied, tmp_path / 'half', {axis: 2}, 'bfloat16')[0].values():
            assert value.dtype == torch.bfloat16


def test_frozen_weights_in_four_bits_are_shared() -> None:
    sizes = dict(vocab_size=8, hidden_size=16, intermediate_size=8, num_layers=2, num_heads=2)
    said = dict(type=InternLM, **sizes, max_seq_len=8)
    said['adapter'] = dict(rank=2, targets=['q_proj'], four_bit=True)
    model = MODELS.build(dict(said))
    for layer in adapted_layers(model):  # as it is held, whatever the numbers mean
        layer.weight = nn.Parameter(torch.zeros(128, 1, dtype=torch.uint8), requires_grad=False)
        layer.scales = torch.ones(4)
    with torch.device('meta'):
        target = MODELS.build(dict(said))
    copy = copy_whole(model, target, CPU, torch.bfloat16)
    for ours, theirs in zip(adapted_layers(copy), adapted_layers(model), strict=True):
        assert ours.weight is theirs.weight and ours.scales is theirs.scales
    for name, theirs in model.named_parameters():
        ours = copy.get_parameter(name)
        assert ours.dtype == (torch.uint8 if theirs.dtype == torch.uint8 else torch.bfloat16)
        assert torch.equal(ours, theirs.to(ours.dtype)), name
    for layer in adapted_layers(model):
        assert layer.scales.dtype == torch.float32
        assert layer.lora_A.weight.requires_grad, 'the model itself goes on to learn'


def test_another_model_is_refused() -> None:
    sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_heads=2, max_seq_len=8)
    with torch.device('meta'):
        target = InternLM(**sizes, num_layers=1)
    with pytest.raises(ValueError, match=r'not like it: layers\.1\..* is in one of them'):
        copy_whole(InternLM(**sizes, num_layers=2), target, CPU, torch.float32)
