"""Objectives, data, adapters, layouts and hooks that do not go together."""

from types import SimpleNamespace as Fake

import pytest
import torch

from internlm_mm.engine import PerplexityLoop, PreferenceLoop
from internlm_mm.engine.alignment import check_alignment
from internlm_mm.engine.hooks import ReferenceHook
from internlm_mm.parallel.mesh import Layout
from internlm_mm.registry import MODELS
from tests.test_models.helpers import SIZES

LORA = dict(type='LoRA', rank=2)
PRECOMPUTED = dict(type='IPO', reference='precomputed')


def check(objective=None, adapter=None, is_paired=True, hooks=(), val_loop=None, **layout) -> None:
    with torch.device('meta'):
        model = MODELS.build(dict(type='InternLM', **SIZES, objective=objective, adapter=adapter))
    dataset = Fake(is_paired=True) if is_paired else Fake()
    loaders = {'train_dataloader': Fake(dataset=dataset)}
    if val_loop is not None:
        loaders['val_dataloader'] = loaders['train_dataloader']
    check_alignment(model, loaders, Layout(**layout), hooks, val_loop)


def test_what_goes_together() -> None:
    check(is_paired=False)
    check(is_paired=False, val_loop=PerplexityLoop)
    check(dict(type='SimPO'), val_loop=PreferenceLoop)
    check(is_paired=False, context=2, pipeline=2)
    check(dict(type='DPO'), LORA, tensor=2, data_shard=2)
    check(PRECOMPUTED, hooks=[ReferenceHook()])
    check(dict(type='SimPO'))
    check(dict(type='PairwiseReward'), LORA)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(), 'NextToken cannot compare the two answers that train_dataloader has'),
        (dict(objective=dict(type='SimPO'), is_paired=False), 'use dataset=dict.type=Preference'),
        (dict(objective=dict(type='SimPO'), context=2), r'strategy\.parallel\.context=2: SimPO'),
        (dict(objective=dict(type='SimPO'), pipeline=2), r'parallel\.pipeline=2: SimPO'),
        (
            dict(objective=dict(type='SimPO'), val_loop=PerplexityLoop),
            r'val_cfg\.type: PerplexityLoop .* of SimPO .*dict\(type=PreferenceLoop\)',
        ),
        (dict(objective=dict(type='DPO')), "'adapters_off', and the model has no adapters"),
        (dict(objective=PRECOMPUTED), 'default_hooks.update.references=dict.type=ReferenceHook'),
    ],
)
def test_what_does_not(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        check(**options)
