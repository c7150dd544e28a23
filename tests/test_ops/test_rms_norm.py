"""RMSNorm against Hugging Face's and float64."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from internlm_mm.ops.needs import Needs, obstacles
from internlm_mm.ops.rms_norm import _apex_normalization, apex_rms_norm, rms_norm
from internlm_mm.registry import NORMS


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_same_bits_as_transformers(dtype):
    x = torch.randn(3, 5, 32).to(dtype)
    norm = LlamaRMSNorm(32, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight, 1.0, 0.2)
    out = rms_norm(x, norm.weight, 1e-5)
    assert out.dtype == dtype
    assert torch.equal(out, norm(x))


def test_float64_is_kept():
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected, rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, weight))


def test_bfloat16_stays_near_float32():
    x, weight = torch.randn(64, 256), torch.randn(256)
    half = rms_norm(x.bfloat16(), weight.bfloat16(), 1e-5)
    # Three roundings to 8 bits, of values up to about 12.
    torch.testing.assert_close(half.float(), rms_norm(x, weight, 1e-5), rtol=2e-2, atol=1e-3)


# ------------------------------------------------------------------------------- other kernels

# As apex/normalization/fused_layer_norm.py has it.
APEX = """
import torch


def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    assert tuple(weight.shape) == tuple(normalized_shape)
    wide = input.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(input.dtype)
"""


@pytest.fixture
def apex(write, monkeypatch):
    path = write('apex/__init__.py', '')
    write('apex/normalization/__init__.py', 'from . import fused_layer_norm\n')
    write('apex/normalization/fused_layer_norm.py', APEX)
    monkeypatch.syspath_prepend(path.parents[1])
    _apex_normalization.cache_clear()
    yield
    _apex_normalization.cache_clear()
    for name in [name for name in sys.modules if name.split('.')[0] == 'apex']:
        del sys.modules[name]


@pytest.fixture
def liger(monkeypatch):
    """As `liger_kernel.transformers.functional` of liger-kernel 0.8.5 has it."""

    def liger_rms_norm(X, W, eps, offset=0.0, casting_mode='llama', in_place=True):
        assert not in_place and casting_mode == 'llama'
        return rms_norm(X, W + offset, eps)

    functional = ModuleType('liger_kernel.transformers.functional')
    functional.liger_rms_norm = liger_rms_norm
    transformers = ModuleType('liger_kernel.transformers')
    transformers.functional = functional
    monkeypatch.setitem(sys.modules, 'liger_kernel', ModuleType('liger_kernel'))
    monkeypatch.setitem(sys.modules, 'liger_kernel.transformers', transformers)
    monkeypatch.setitem(sys.modules, 'liger_kernel.transformers.functional', functional)


def same_as_the_reference(name, device='cpu', dtype=torch.float32, tolerance=1e-5):
    x = torch.randn(3, 5, 64, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(64, device=device, dtype=dtype, requires_grad=True)
    out, expected = NORMS.get(name)(x, weight, 1e-5), rms_norm(x, weight, 1e-5)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(out)
    grads, wanted = (
        torch.autograd.grad(value, (x, weight), grad.clone()) for value in (out, expected)
    )
    for one, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, want, rtol=tolerance, atol=tolerance)


def test_names():
    assert NORMS.get('torch') is rms_norm


def test_torchs_own_kernel():
    same_as_the_reference('fused')


def test_apex_by_its_documented_signature(apex):
    same_as_the_reference('apex')


def test_apex_that_is_not_there():
    with pytest.raises(ImportError, match=r"strategy\.kernels\.norm='apex' needs NVIDIA's apex"):
        _apex_normalization()
    (reason,) = apex_rms_norm.missing()
    assert reason.startswith("needs NVIDIA's apex, which is not installed")  # without the key


def test_liger_by_its_signature(liger):
    same_as_the_reference('liger')


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('name', ['apex', 'fused', 'liger'])
def test_kernels_that_are_installed(name):
    found = obstacles(getattr(NORMS.get(name), 'needs', Needs()), 'cuda', torch.bfloat16)
    if found or (name == 'apex' and importlib.util.find_spec('apex') is None):
        pytest.skip(f'{name} {"; ".join(found) or "is not installed"}')
    # Sums of 15 rows of values that are rounded to 8 bits.
    same_as_the_reference(name, 'cuda', torch.bfloat16, 6e-2)
