"""The kernel that puts gradients in the place of logits, against float64."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from internlm_mm.ops.cross_entropy import (
    linear_cross_entropy,
    reference_linear_cross_entropy,
    softmax_gradient_kernel,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device'),
    pytest.mark.skipif(not importlib.util.find_spec('triton'), reason='triton is not installed'),
]


def kernel(logits: Tensor, targets: Tensor) -> Tensor:
    found = softmax_gradient_kernel()
    assert found is not None
    return found(logits, targets)


@pytest.mark.parametrize('vocab_size', [50, 8192, 8193, 103_168])
@pytest.mark.parametrize(
    ('dtype', 'tolerance'), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)]
)
def test_as_float64_does(vocab_size: int, dtype: torch.dtype, tolerance: float) -> None:
    logits = (8 * torch.randn(37, vocab_size, device='cuda')).to(dtype)
    logits[0, 7] = 60.0  # sure, and rightly so
    targets = torch.randint(vocab_size, (37,), device='cuda')
    targets[0], targets[1] = 7, vocab_size - 1
    exact = logits.double().requires_grad_()
    expected = F.log_softmax(exact, -1).gather(1, targets.unsqueeze(1)).squeeze(1)
    (-expected.sum()).backward()
    log_probs = kernel(logits, targets)
    torch.testing.assert_close(log_probs, expected.float(), rtol=1e-5, atol=1e-5)
    assert exact.grad is not None
    assert (logits.double() - exact.grad).abs().max() <= tolerance
    assert logits[0, 7].abs() < 1e-6


def test_rows_of_a_wider_tensor() -> None:
    wide = torch.randn(9, 128, device='cuda')
    logits, rest = wide[:, :100], wide[:, 100:].clone()
    targets = torch.randint(100, (9,), device='cuda')
    whole = logits.clone()
    expected = kernel(whole, targets)
    torch.testing.assert_close(kernel(logits, targets), expected)
    torch.testing.assert_close(logits, whole)
    assert torch.equal(wide[:, 100:], rest)
    with pytest.raises(ValueError, match='must be contiguous'):
        kernel(torch.randn(4, 8, device='cuda').T, targets[:8])


@pytest.mark.parametrize('chunk', [64, 100, 4096])
def test_the_loss_with_it(chunk: int) -> None:
    hidden = torch.randn(200, 64, device='cuda', dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(3000, 64, device='cuda', dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(3000, (200,), device='cuda')
    labels[::7] = -100
    loss, _ = linear_cross_entropy(hidden, weight, labels, chunk=chunk)
    loss.backward()
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected, _ = reference_linear_cross_entropy(exact[0], exact[1], labels)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=0.0)
    for ours, theirs in zip((hidden, weight), exact, strict=True):
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 1e-2, error
