"""The fused head and loss against torch's own cross-entropy in float64."""

import pytest
import torch
import torch.nn.functional as F

from internlm_mm.ops.cross_entropy import linear_cross_entropy, reference_linear_cross_entropy
from internlm_mm.structures import IGNORE_INDEX


def inputs(tokens=37, hidden=16, vocab=50, dtype=torch.float32):
    h = torch.randn(tokens, hidden).to(dtype).requires_grad_()
    w = torch.randn(vocab, hidden).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (tokens,))
    labels[::9] = IGNORE_INDEX
    return h, w, labels


def oracle(h, w, labels, smoothing):
    """torch's, in float64."""
    h, w = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    losses = F.cross_entropy(h @ w.T, labels, reduction='none', label_smoothing=smoothing)
    return h, w, losses


@pytest.mark.parametrize('scale', [1.0, 3.0])
@pytest.mark.parametrize('chunk', [1, 8, 37, 1000])
@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.9])
def test_value_and_gradients(smoothing, chunk, scale):
    h, w, labels = inputs()
    loss, token_losses = linear_cross_entropy(h, w, labels, smoothing, chunk)
    (loss * scale).backward()
    h64, w64, expected = oracle(h, w, labels, smoothing)
    (expected.sum() * scale).backward()
    torch.testing.assert_close(loss.double(), expected.sum(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(token_losses.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h.grad.double(), h64.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(w.grad.double(), w64.grad, rtol=1e-5, atol=1e-5)
    assert loss.dtype == token_losses.dtype == torch.float32
    assert loss.shape == () and not token_losses.requires_grad
    assert h.grad[labels == IGNORE_INDEX].abs().max() == 0


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_plain_reference_is_torch(smoothing):
    h, w, labels = inputs()
    loss, token_losses = reference_linear_cross_entropy(h, w, labels, smoothing)
    _, _, expected = oracle(h, w, labels, smoothing)
    torch.testing.assert_close(loss.double(), expected.sum(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(token_losses.double(), expected, rtol=1e-5, atol=1e-5)


def test_numerical_gradient():
    h, w, labels = inputs(tokens=5, hidden=3, vocab=7, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, 0.1, 2)[0], (h, w)
    )


def test_half_precision_accumulates_the_weight_gradient_wide():
    # One label for all: its row of the gradient is a sum of 4000 terms of the same sign, which
    # bfloat16 would stop adding to after 256.
    h = torch.ones(4000, 8, dtype=torch.bfloat16)
    w = torch.zeros(16, 8, dtype=torch.bfloat16, requires_grad=True)
    loss, _ = linear_cross_entropy(h, w, torch.zeros(4000, dtype=torch.int64), chunk=10)
    loss.backward()
    assert w.grad.dtype == torch.bfloat16
    torch.testing.assert_close(w.grad[0].float(), torch.full((8,), -3750.0), rtol=1e-2, atol=0)
    torch.testing.assert_close(loss.item(), 4000 * torch.tensor(16.0).log().item())


def test_bfloat16_stays_near_float32():
    h, w, labels = inputs(dtype=torch.bfloat16)
    loss, _ = linear_cross_entropy(h, w, labels, 0.1, 8)
    loss.backward()
    h64, w64, expected = oracle(h, w, labels, 0.1)
    expected.sum().backward()
    # Logits are rounded to 8 bits, about 2^-8 of values of about 4 in each of 32 tokens.
    torch.testing.assert_close(loss.double(), expected.sum(), rtol=5e-3, atol=0)
    torch.testing.assert_close(h.grad.double(), h64.grad, rtol=0, atol=0.05)
    torch.testing.assert_close(w.grad.double(), w64.grad, rtol=0, atol=0.05)


@pytest.mark.parametrize('trained', [0, 1])
def test_one_side_frozen(trained):
    h, w, labels = inputs()
    (h, w)[1 - trained].requires_grad_(False)
    linear_cross_entropy(h, w, labels)[0].backward()
    h64, w64, expected = oracle(h, w, labels, 0.0)
    expected.sum().backward()
    assert (h, w)[1 - trained].grad is None
    torch.testing.assert_close(
        (h, w)[trained].grad.double(), (h64, w64)[trained].grad, rtol=1e-5, atol=1e-5
    )


def test_without_gradients_none_are_computed():
    h, w, labels = inputs()
    with torch.no_grad():
        loss, _ = linear_cross_entropy(h, w, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, linear_cross_entropy(h, w, labels)[0].detach())


def test_nothing_labelled():
    h, w, labels = inputs()
    loss, token_losses = linear_cross_entropy(h, w, torch.full_like(labels, IGNORE_INDEX))
    loss.backward()
    assert loss == 0 and token_losses.abs().max() == 0
    assert h.grad.abs().max() == w.grad.abs().max() == 0


def test_logits_are_never_held_whole():
    h, w, labels = inputs(tokens=512, hidden=4, vocab=64)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        linear_cross_entropy(h, w, labels, 0.1, chunk=64)[0].backward()
    assert largest == 64 * 64
