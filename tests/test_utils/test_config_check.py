"""Every way in which a config can be wrong is found, and nothing that is right is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config

from internlm_mm.parallel.context import CONTEXT_ATTENTIONS
from internlm_mm.parallel.data import RESHARD
from internlm_mm.parallel.float8 import check_float8
from internlm_mm.parallel.kernels import check_kernels
from internlm_mm.parallel.mesh import resolve_layout
from internlm_mm.parallel.options import check_options
from internlm_mm.registry import SCHEDULES
from internlm_mm.utils.config import load_config, parse_cfg_options
from internlm_mm.utils.config_check import CHOICES, EXAMPLES, MASK, check_config
from internlm_mm.utils.config_reader import ConfigError

Write = Callable[[str, str], Path]


def config(**changes: Any) -> Config:
    """A small config that is right but for `changes`, given by key with `__` for the dot."""
    model = dict(
        type='InternLM',
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        max_seq_len=16,
    )
    cfg = Config(
        dict(
            model=model,
            optim_wrapper=dict(
                type='HybridZeroOptimWrapper',
                optimizer=dict(type='AdamW', lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1),
            ),
            param_scheduler=[
                dict(type='LinearLR', start_factor=0.1, end=10, by_epoch=False),
                dict(type='CosineAnnealingLR', T_max=90, begin=10, by_epoch=False),
            ],
            default_hooks=dict(
                timer=dict(type='IterTimerHook'),
                logger=dict(type='LoggerHook', interval=10, priority='BELOW_NORMAL'),
                none=None,
            ),
            custom_hooks=[dict(type='EmptyCacheHook', after_iter=True)],
            visualizer=dict(
                type='Visualizer',
                vis_backends=[dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')],
            ),
            log_processor=dict(window_size=5),
            launcher='none',
            resume=False,
            load_from=None,
            log_level='INFO',
            randomness=dict(seed=0),
            env_cfg=dict(cudnn_benchmark=False),
            default_scope='internlm_mm',
        )
    )
    for dotted, value in changes.items():
        *holders, last = dotted.split('__')
        node: Any = cfg._cfg_dict
        for holder in holders:
            node = node[int(holder)] if holder.isdigit() else node[holder]
        node[last] = value
    return cfg


def test_what_is_right_passes() -> None:
    check_config(config())


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            {'model__num_layer': 3},
            "model.num_layer=3: InternLM has no option 'num_layer'. Did you mean 'num_layers'?",
        ),
        ({'model__hidden_size': '64'}, "model.hidden_size='64': expected int"),
        ({'model__num_layers': 2.0}, 'model.num_layers=2.0: expected int; write 2'),
        ({'model__num_layers': True}, 'model.num_layers=True: expected int'),
        ({'model__norm_eps': 'x'}, "model.norm_eps='x': expected float"),
        ({'model__type': 'InternLn'}, "model.type='InternLn': no model is registered"),
        ({'model__type': 'InternLn'}, "Did you mean 'InternLM'?"),
        ({'modle': {}}, "modle={}: a config has no key 'modle'. Did you mean 'model'?"),
        ({'model': None}, 'the config has no model'),
        ({'train_cfg': dict(max_iters=3)}, 'train_cfg has no type'),
        (
            {'optim_wrapper__optimizer__fussed': True},
            'optim_wrapper.optimizer.fussed=True: AdamW has no option '
            "'fussed'. Did you mean 'fused'?",
        ),
        ({'optim_wrapper__optimizer__lr': '3e-4'}, "optim_wrapper.optimizer.lr='3e-4': expected"),
        ({'optim_wrapper__optimizer__type': 'AdamV'}, "Did you mean 'Adam'?"),
        (
            {'optim_wrapper__constructor': 'DecayGroupConstructor'},
            "optim_wrapper.constructor='DecayGroupConstructor': no optimizer wrapper constructor "
            "is registered under this name. Did you mean 'DecayGroupsConstructor'?",
        ),
        ({'optim_wrapper__clip': 1}, "HybridZeroOptimWrapper has no option 'clip'"),
        (
            {'param_scheduler__1__by_epoc': False},
            "param_scheduler.1.by_epoc=False: CosineAnnealingLR has no option 'by_epoc'",
        ),
        ({'default_hooks__logger__interval': 1.5}, 'default_hooks.logger.interval=1.5: expected'),
        ({'default_hooks__logger__intervall': 1}, "Did you mean 'interval'?"),
        ({'default_hooks__timer': dict(type='IterTimeHook')}, "Did you mean 'IterTimerHook'?"),
        ({'default_hooks__timer': dict(interval=1)}, 'default_hooks.timer has no type'),
        ({'model__objective': dict(chunk_tokens=0)}, 'model.objective has no type'),
        (
            {'default_hooks__timer': dict(type='CheckpointHook', intervall=1)},
            "CheckpointHook has no option 'intervall'. Did you mean 'interval'?",
        ),
        ({'custom_hooks__0__afteriter': True}, 'custom_hooks.0.afteriter=True: EmptyCacheHook'),
        ({'visualizer__vis_backends': [dict(type='TensorBoard')]}, "'TensorboardVisBackend'"),
        ({'log_processor__window': 1}, "LogProcessor has no option 'window'"),
        (
            {'launcher': 'slrum'},
            "launcher='slrum': expected 'none' or 'pytorch' or 'slurm' or 'mpi'"
            ". Did you mean 'slurm'?",
        ),
        (
            {'optim_wrapper__clip_grad': 1.0},
            'optim_wrapper.clip_grad=1.0: expected dict or None, as '
            'optim_wrapper.clip_grad.max_norm=1.0',
        ),
        ({'randomness__sed': 1}, "randomness.sed=1: randomness has no option 'sed'"),
        ({'env_cfg__cudnn': True}, "env_cfg.cudnn=True: env_cfg has no option 'cudnn'"),
        ({'log_level': 'LOUD'}, "log_level='LOUD': expected 'DEBUG'"),
        ({'runner_type': 'LLMRuner'}, "runner_type='LLMRuner': no runner is registered"),
        (
            {'custom_hooks': [dict(type='EmptyCacheHook', x=dict(type='LogerHook'))]},
            "custom_hooks.0.x.type='LogerHook': no class is registered under this name. "
            "Did you mean 'LoggerHook'?",
        ),
        ({'custom_hooks__0__after_iter': MASK}, 'was masked in a dump'),
        ({'custom_hooks__0__after_iter': f'http://{MASK}@host'}, 'was masked in a dump'),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(config(**change))
    assert message in str(caught.value)


def test_every_missing_argument_is_named() -> None:
    cfg = config()
    del cfg._cfg_dict['model']['vocab_size'], cfg._cfg_dict['model']['num_heads']
    with pytest.raises(ConfigError, match=r'^model: InternLM needs vocab_size, num_heads$'):
        check_config(cfg)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(config(model__a=1, launcher='x', default_hooks__logger__b=2))
    assert len(str(caught.value).splitlines()) == 3


def test_classes_that_a_file_imports(write: Write) -> None:
    path = write(
        'a.py',
        """
        import torch
        from internlm_mm.models import InternLM, InternLn
        from mmengine.hooks import LoggerHook
        from torch.optim import AdamW

        model = dict(type=InternLn, vocab_size=1)
        default_hooks = dict(logger=dict(type=LoggerHook, interval=torch.pi))
        optim_wrapper = dict(optimizer=dict(type=AdamW, lrr=1))
        """,
    )
    with pytest.raises(ConfigError) as caught:
        check_config(load_config(path))
    lines = str(caught.value).splitlines()
    assert f'{path}, line 3 imports InternLn' in lines[0] and "'InternLM'" in lines[0]
    assert any(line.startswith('optim_wrapper.optimizer.lrr=1: AdamW') for line in lines)
    assert any('an imported value cannot be written back' in line for line in lines)


def test_a_plugin_by_class_and_by_name(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = write(
        'house_plugin_e.py',
        """
        from mmengine.hooks import Hook
        from internlm_mm.registry import HOOKS


        @HOOKS.register_module()
        class HousePluginHook(Hook):
            def __init__(self, every: int = 1) -> None:
                self.every = every
        """,
    )
    monkeypatch.syspath_prepend(plugin.parent)
    path = write(
        'a.py',
        """
        from internlm_mm.models import InternLM
        from house_plugin_e import HousePluginHook

        custom_imports = dict(imports=['house_plugin_e'])
        model = dict(type=InternLM, vocab_size=8, hidden_size=8, intermediate_size=8,
                     num_layers=1, num_heads=1, max_seq_len=8)
        custom_hooks = [dict(type='HousePluginHook', every=2), dict(type=HousePluginHook)]
        """,
    )
    check_config(load_config(path))
    with pytest.raises(ConfigError, match=r"custom_hooks.0.evry=3.*'every'"):
        check_config(load_config(path, {'custom_hooks.0.evry': 3}))


def test_hooks_have_their_shape() -> None:
    tiny = load_config('internlm_tiny_pretrain')
    tiny.default_hooks.checkpoint = [1, 2]
    with pytest.raises(ConfigError, match=r'default_hooks\.checkpoint=.*expected dict\(type='):
        check_config(tiny)
    tiny = load_config('internlm_tiny_pretrain')
    tiny.custom_hooks = {'a': 1}
    with pytest.raises(ConfigError, match=r'custom_hooks=.*expected a list of hooks'):
        check_config(tiny)


@pytest.mark.parametrize(
    'options, message',
    [
        ({'model.adapter.rnk': 4}, r"model\.adapter\.rnk=4: LoRA has no option 'rnk'.*'rank'"),
        ({'model.adapter.rank': 'x'}, r"model\.adapter\.rank='x': expected int"),
        ({'model.adapter.type': 'Lora'}, r"model\.adapter\.type='Lora': no adapter .*'LoRA'"),
        ({'model.adapter': 'LoRA'}, r"model\.adapter='LoRA': expected dict\(type="),
        ({'model.adaptr.rank': 4}, r"model\.adaptr=.*InternLM has no option 'adaptr'.*'adapter'"),
    ],
)
def test_adapters_are_checked_as_calls(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(load_config('internlm_tiny_pretrain', options))
    for adapter in ({'rank': 4}, {'type': 'LoRA', 'targets': ['q_proj']}, None):
        check_config(load_config('internlm_tiny_pretrain', {'model.adapter': adapter}))


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('attention', None, 'expected str. Valid: auto, cudnn, '),
        ('attention', 5, 'expected str. Valid: auto, cudnn, '),
        ('reshard', None, 'expected str. Valid: layer, never, step.'),
        ('float8', True, 'expected dict or None, as strategy.float8.recipe=tensorwise'),
        ('kernels', 'liger', 'expected dict or None, as strategy.kernels.norm=liger'),
    ],
)
def test_what_a_strategy_takes_is_told(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(load_config('internlm_tiny_pretrain', {f'strategy.{key}': value}))
    assert f'strategy.{key}={value!r}: {message}' in str(caught.value)


def test_what_is_told_is_right() -> None:
    options = parse_cfg_options([f'{key}.{example}' for key, example in EXAMPLES.items()])
    cfg = load_config('internlm_tiny_pretrain', options)
    check_config(cfg)
    strategy = dict(cfg.strategy)
    check_kernels(strategy['kernels'])
    check_float8(strategy['float8'], check_options(strategy['precision'], 'step')[0])
    assert strategy['pipeline']['schedule'] in SCHEDULES.module_dict
    assert resolve_layout(strategy['parallel'], 8, 8).data_shard == 8
    assert CHOICES['strategy.reshard'] == RESHARD
    assert CHOICES['strategy.context_attention'] == tuple(CONTEXT_ATTENTIONS)
