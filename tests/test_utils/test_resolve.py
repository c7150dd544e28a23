"""From what a config writes as `type` to a class."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config.lazy import LazyObject
from mmengine.hooks import LoggerHook

from internlm_mm import registry
from internlm_mm.models import InternLM
from internlm_mm.registry import HOOKS, MODELS, OPTIMIZERS, Registry
from internlm_mm.utils.config_reader import ConfigError
from internlm_mm.utils.resolve import import_lazy, resolve_type


@pytest.mark.parametrize(
    ('named', 'where', 'found'),
    [
        (InternLM, MODELS, InternLM),
        ('InternLM', MODELS, InternLM),
        ('internlm_mm.InternLM', MODELS, InternLM),
        ('internlm_mm.models.InternLM', MODELS, InternLM),
        ('InternLM', None, InternLM),
        (LazyObject('internlm_mm.models', 'InternLM'), MODELS, InternLM),
        ('LoggerHook', HOOKS, LoggerHook),
        ('mmengine.LoggerHook', HOOKS, LoggerHook),
        ('AdamW', OPTIMIZERS, torch.optim.AdamW),
        ('torch.nn.Linear', MODELS, torch.nn.Linear),
        ('torch.nn.Module.to', None, torch.nn.Module.to),
    ],
)
def test_finds(named: object, where: Registry | None, found: object) -> None:
    assert resolve_type(named, where, 'model.type') is found


def test_an_empty_registry_is_still_a_registry() -> None:
    with pytest.raises(ConfigError, match='no inferencer is registered'):
        resolve_type('InternLM', registry.INFERENCERS, 'x.type')


@pytest.mark.parametrize(
    ('named', 'message'),
    [
        ('InternLn', "model.type='InternLn': no model is .*Did you mean 'InternLM'"),
        ('internlm_mm.models.InternLN', "Did you mean 'InternLM'"),
        ('no_package.InternLN', "Did you mean 'InternLM'"),
        (3, 'model.type=3: expected a class or the name of one'),
        (LazyObject('internlm_mm.models', 'InternLN', 'a.py, line 3'), "line 3.*'InternLM'"),
        (
            LazyObject('internlm_mm.modles', 'InternLM', 'a.py, line 3'),
            'line 3.*internlm_mm.modles',
        ),
    ],
)
def test_names_the_nearest(named: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_type(named, MODELS, 'model.type')


def test_a_package_that_fails_to_import_is_not_called_missing(
    write: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = write('house_plugin_d.py', 'import nothing_of_that_name\nclass A: pass\n')
    monkeypatch.syspath_prepend(plugin.parent)
    with pytest.raises(ConfigError, match='nothing_of_that_name'):
        resolve_type('house_plugin_d.A', MODELS, 'model.type')


def test_lazy_values_are_imported() -> None:
    assert import_lazy(LazyObject('math', 'pi'), 'x') == pytest.approx(3.14159, abs=1e-5)
