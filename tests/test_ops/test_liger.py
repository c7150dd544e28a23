"""Liger's cross-entropy: its calls over a stand-in with its signature; its kernel where it runs."""

import ast
import sys
from importlib.metadata import PackageNotFoundError, distribution
from inspect import signature
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from internlm_mm.ops import liger_cross_entropy, linear_cross_entropy
from internlm_mm.ops.needs import obstacles
from internlm_mm.ops.rms_norm import LIGER
from internlm_mm.registry import CROSS_ENTROPIES
from internlm_mm.structures import IGNORE_INDEX


def fused(
    input,  # noqa: A002  Liger's word
    weight,
    target,
    bias=None,
    ce_weight=None,
    ignore_index=-100,
    lse_square_scale=0.0,
    label_smoothing=0.0,
    reduction='mean',
    softcap=None,
    return_z_loss=False,
    accum_dtype=None,
):
    """Of liger-kernel 0.8.5, `liger_kernel.transformers.functional`."""
    assert accum_dtype == torch.float32
    return F.cross_entropy(
        input @ weight.T,
        target,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


@pytest.fixture
def stand_in(monkeypatch):
    functional = ModuleType('liger_kernel.transformers.functional')
    functional.liger_fused_linear_cross_entropy = fused
    transformers = ModuleType('liger_kernel.transformers')
    transformers.functional = functional
    monkeypatch.setitem(sys.modules, 'liger_kernel', ModuleType('liger_kernel'))
    monkeypatch.setitem(sys.modules, 'liger_kernel.transformers', transformers)
    monkeypatch.setitem(sys.modules, 'liger_kernel.transformers.functional', functional)


def inputs(device='cpu', dtype=torch.float32):
    hidden = torch.randn(20, 16, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(30, 16, device=device, dtype=dtype, requires_grad=True)
    labels = torch.randint(30, (20,), device=device)
    labels[3:7] = IGNORE_INDEX
    return hidden, weight, labels


def compare(hidden, weight, labels, smoothing, tolerance):
    loss, tokens = liger_cross_entropy(hidden, weight, labels, smoothing)
    expected, _ = linear_cross_entropy(hidden, weight, labels, smoothing)
    assert tokens is None
    torch.testing.assert_close(loss.float(), expected, rtol=tolerance, atol=tolerance)
    grads, wanted = (
        torch.autograd.grad(3 * value, (hidden, weight), retain_graph=True)
        for value in (loss, expected)
    )
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_it_is_asked_for_a_sum(stand_in, smoothing):
    compare(*inputs(), smoothing, 1e-5)


def test_names():
    assert CROSS_ENTROPIES.get('torch') is linear_cross_entropy
    assert CROSS_ENTROPIES.get('liger') is liger_cross_entropy


def test_the_real_package_has_these_arguments():
    try:
        package = distribution('liger-kernel')
    except PackageNotFoundError:
        pytest.skip('liger-kernel is not installed')
    name = 'liger_kernel/transformers/functional.py'
    (file,) = (f for f in package.files or () if str(f) == name)
    there = {
        node.name: [a.arg for a in node.args.args]
        for node in ast.parse(file.read_text(encoding='utf-8')).body
        if isinstance(node, ast.FunctionDef)
    }
    expected = list(signature(fused).parameters)
    assert there['liger_fused_linear_cross_entropy'][: len(expected)] == expected
    norm = there['liger_rms_norm']
    assert norm[:3] == ['X', 'W', 'eps'] and 'in_place' in norm


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_liger_itself(smoothing):
    found = obstacles(LIGER, 'cuda', torch.bfloat16)
    if found:
        pytest.skip(f'liger {"; ".join(found)}')
    compare(*inputs('cuda', torch.bfloat16), smoothing, 5e-2)
