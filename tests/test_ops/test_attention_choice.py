"""Which backend is taken, and in which words another is refused."""

import sys

import pytest
import torch

from internlm_mm.ops.attention_choice import PREFERRED, choose_attention
from internlm_mm.ops.attention_trial import try_attention
from internlm_mm.registry import ATTENTIONS


@pytest.mark.parametrize(
    ('device', 'dtype', 'packed', 'name'),
    [
        ('cuda', torch.bfloat16, True, 'varlen'),
        ('cuda', torch.bfloat16, False, 'cudnn'),
        ('cuda', torch.float32, True, 'sdpa'),
        ('cpu', torch.bfloat16, True, 'sdpa'),
    ],
)
def test_auto(device, dtype, packed, name):
    chosen, reason = choose_attention('auto', device, dtype, packed)
    assert chosen == name
    assert reason


@pytest.mark.parametrize(
    ('name', 'device', 'dtype', 'packed', 'message'),
    [
        ('spda', 'cpu', torch.float32, False, "strategy.attention='spda' is unknown.* 'sdpa'"),
        ('varlen', 'cpu', torch.bfloat16, True, 'needs CUDA in half precision, not cpu'),
        ('cudnn', 'cuda', torch.float32, False, 'needs CUDA in half precision.*float32'),
        ('cudnn', 'cuda', torch.bfloat16, True, 'one document a row'),
        (
            'flex',
            'cpu',
            torch.float32,
            True,
            "strategy.attention='flex' needs CUDA, not cpu.*'auto' picks",
        ),
        ('flash2', 'cpu', torch.float32, True, 'needs CUDA in half .*not installed: pip install'),
        ('flash3', 'cuda', torch.bfloat16, True, 'not installed: build it from https://'),
        ('flash4', 'cuda', torch.bfloat16, True, r"not installed: .*'internlm_mm\[flash4\]'"),
    ],
)
def test_a_backend_that_cannot_run(name, device, dtype, packed, message):
    with pytest.raises(ValueError, match=message):
        choose_attention(name, device, dtype, packed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('packed', [True, False], ids=['packed', 'dense'])
@pytest.mark.parametrize('width', [*range(8, 136, 8), 192, 256])
def test_what_auto_takes_on_cuda_is_right_for_every_width(width, packed):
    """Of head sizes that a kernel does not say it cannot, some gave other gradients."""
    name, _ = choose_attention('auto', 'cuda', torch.bfloat16, packed, width)
    try_attention(ATTENTIONS.get(name), torch.device('cuda'), torch.bfloat16, packed, width)


def test_auto_keeps_off_kernels_that_an_old_gpu_has_not(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
    for packed in (False, True):
        name, why = choose_attention('auto', 'cuda', torch.float16, packed)
        assert name == 'sdpa' and 'sm_80' in why


def test_a_package_that_is_missing_here_may_be_elsewhere(monkeypatch):
    monkeypatch.setitem(sys.modules, 'flash_attn', None)  # as if it were not installed
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))  # too old
    with pytest.raises(ValueError, match=r"strategy.attention='flash4' needs a GPU .*is not inst"):
        choose_attention('flash4', 'cuda', torch.bfloat16, True, 128)
    name, why = choose_attention('flash4', 'cuda', torch.bfloat16, True, 128, elsewhere=True)
    assert name == 'flash4' and 'on this machine it is not installed: pip install' in why
    assert (
        choose_attention('auto', 'cuda', torch.bfloat16, True, 128, elsewhere=True)[0] == 'varlen'
    )
    why = choose_attention('varlen', 'cuda', torch.bfloat16, True, 128, elsewhere=True)[1]
    assert why == 'named in the config'
    for dtype, width, text in (
        (torch.float32, 128, 'half prec'),
        (torch.bfloat16, 256, 'up to 128'),
    ):
        with pytest.raises(ValueError, match=text) as refused:  # so it would be there, too
            choose_attention('flash4', 'cuda', dtype, True, width, elsewhere=True)
        assert 'installed' not in str(refused.value)


def test_heads_that_a_backend_does_not_take():
    with pytest.raises(ValueError, match='up to 256 channels, a multiple of 8, not 320'):
        choose_attention('flash2', 'cuda', torch.bfloat16, True, 320)
    for odd in (20, 48, 80, 112):
        with pytest.raises(ValueError, match=f'a multiple of 32, not {odd}'):
            choose_attention('flash4', 'cuda', torch.bfloat16, True, odd)
    with pytest.raises(
        ValueError, match=r"'cudnn' takes heads of up to 128 .*not 256.*'auto' picks"
    ):
        choose_attention('cudnn', 'cuda', torch.bfloat16, False, 256)


@pytest.mark.parametrize('packed', [True, False], ids=['packed', 'dense'])
@pytest.mark.parametrize(('head_dim', 'odd'), [(128, False), (20, True), (512, True)])
def test_auto_takes_heads_of_any_width(packed: bool, head_dim: int, odd: bool):
    name, why = choose_attention('auto', 'cuda', torch.bfloat16, packed, head_dim)
    assert (name == 'sdpa') == odd
    assert (f'a multiple of 8, not {head_dim}' in why) == odd


def test_auto_takes_the_first_preference_that_runs(monkeypatch):
    """Putting a backend in front is all it takes, and one that is not there does no harm."""
    monkeypatch.setitem(PREFERRED, True, ('flash4', 'varlen'))
    name, why = choose_attention('auto', 'cuda', torch.bfloat16, True)
    assert name == 'varlen' and 'flash4 is not installed' in why
    monkeypatch.setitem(PREFERRED, True, ('sdpa', 'varlen'))
    assert choose_attention('auto', 'cuda', torch.bfloat16, True)[0] == 'sdpa'
    monkeypatch.setitem(PREFERRED, True, ('flash4',))
    assert choose_attention('auto', 'cuda', torch.bfloat16, True)[0] == 'sdpa'


def test_a_plug_in_that_says_nothing_is_taken_at_its_word(monkeypatch):
    monkeypatch.setitem(ATTENTIONS.module_dict, 'mine', lambda q, k, v, documents: q)
    assert choose_attention('mine', 'cpu', torch.float32, True) == ('mine', 'named in the config')
