"""Machines and installations that a kernel does not run on."""

import sys

import pytest
import torch

from internlm_mm.ops.needs import Needs, obstacles


def ask(needs: Needs, device: str = 'cpu', dtype: torch.dtype = torch.float32, **options) -> str:
    return '; '.join(obstacles(needs, device, dtype, **options))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    def of(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)

    return of


def test_nothing_is_asked_by_default() -> None:
    assert ask(Needs(), packed=True, head_dim=7) == ''


@pytest.mark.parametrize(
    ('needs', 'device', 'dtype', 'text'),
    [
        (Needs(cuda=True), 'cpu', torch.float32, 'needs CUDA, not cpu in torch.float32'),
        (Needs(cuda=True), 'cuda', torch.float32, ''),
        (
            Needs(cuda=True, half=True),
            'cuda',
            torch.float32,
            'needs CUDA in half precision, not cuda in torch.float32',
        ),
        (Needs(cuda=True, half=True), 'cuda', torch.float16, ''),
    ],
)
def test_device_and_dtype(needs: Needs, device: str, dtype: torch.dtype, text: str) -> None:
    assert ask(needs, device, dtype) == text


@pytest.mark.parametrize(
    ('capability', 'text'),
    [
        ((8, 9), 'needs a GPU of sm_90 or newer, not sm_89'),
        ((9, 0), ''),
        ((12, 0), 'needs a GPU of sm_9x, sm_10x, not sm_120'),
    ],
)
def test_age_of_the_gpu(gpu, capability: tuple[int, int], text: str) -> None:
    gpu(capability)
    needs = Needs(cuda=True, capability=(9, 0), majors=(9, 10))
    assert ask(needs, 'cuda', torch.bfloat16) == text


def test_shapes() -> None:
    assert 'one document a row' in ask(Needs(packed=False), packed=True)
    assert ask(Needs(head_dim=128), head_dim=128) == ''
    assert 'not 136' in ask(Needs(head_dim=128), head_dim=136)
    assert 'not 12' in ask(Needs(head_dim=128), head_dim=12)
    assert ask(Needs(head_dim=128, head_dim_multiple=32), head_dim=96) == ''
    assert 'of 32, not 48' in ask(Needs(head_dim=128, head_dim_multiple=32), head_dim=48)


def test_packages(write, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write('whole_package/part.py', 'VALUE = 1\n').parents[1]
    write('broken_package/part.py', 'import no_such_thing\n')
    write('angry_package/part.py', 'raise RuntimeError("no driver")\n')
    monkeypatch.syspath_prepend(folder)
    told = {
        module: ask(Needs(module=module, install='pip install it'))
        for module in (
            'whole_package.part',
            'whole_package.other',
            'no_such_package.part',
            'broken_package.part',
            'angry_package.part',
        )
    }
    for name in [n for n in sys.modules if n.partition('_package')[1]]:
        monkeypatch.delitem(sys.modules, name)
    assert told == {
        'whole_package.part': '',
        'whole_package.other': 'is not installed: pip install it',
        'no_such_package.part': 'is not installed: pip install it',
        'broken_package.part': "cannot be imported (No module named 'no_such_thing'): "
        'pip install it',
        'angry_package.part': 'cannot be imported (RuntimeError: no driver): pip install it',
    }


def test_every_reason_is_given_at_once() -> None:
    needs = Needs(module='no_such_package', install='pip install it', cuda=True, packed=False)
    assert len(obstacles(needs, 'cpu', torch.float32, packed=True)) == 3
