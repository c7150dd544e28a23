"""The registries are children of MMEngine's and find what MMEngine has."""

import mmengine.registry
import pytest
import torch
from mmengine.registry import DefaultScope, Registry

from internlm_mm import registry

OURS = {name: value for name, value in vars(registry).items() if isinstance(value, Registry)}
ROOTS = {
    name: value
    for name, value in vars(mmengine.registry.root).items()
    if isinstance(value, Registry)
}


@pytest.mark.parametrize('name', sorted(ROOTS))
def test_every_root_has_a_child_of_ours(name: str) -> None:
    child = OURS[name]
    assert child.parent is ROOTS[name]
    assert child.scope == 'internlm_mm'


@pytest.mark.parametrize('name', sorted(OURS))
def test_locations_can_be_imported(name: str) -> None:
    OURS[name].import_from_location()


def test_a_root_builds_our_classes_in_our_scope(capsys: pytest.CaptureFixture[str]) -> None:
    with DefaultScope.overwrite_default_scope('internlm_mm'):
        options = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1)
        with torch.device('meta'):
            model = ROOTS['MODELS'].build(dict(type='InternLM', max_seq_len=8, **options))
    assert type(model).__module__.startswith('internlm_mm.models')
    assert 'workaround' not in capsys.readouterr().out
