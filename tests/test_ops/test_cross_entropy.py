"""The fused head and loss against torch's own cross-entropy in float64."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_mm.ops import cross_entropy
from internlm_mm.ops.cross_entropy import (
    VocabularyShard,
    linear_cross_entropy,
    linear_token_losses,
    reference_linear_cross_entropy,
)
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


@pytest.mark.parametrize('chunk', [8, 1000])
def test_a_kernel_that_puts_gradients_in_place(monkeypatch, chunk):
    seen = []

    def in_place(logits, targets):
        seen.append(len(logits))
        log_probs = F.log_softmax(logits, -1)
        target = log_probs.gather(1, targets.unsqueeze(1))
        logits.copy_(log_probs.exp().scatter_add(1, targets.unsqueeze(1), -torch.ones_like(target)))
        return target.squeeze(1)

    monkeypatch.setattr(cross_entropy, '_gradient_kernel', lambda *_: in_place)
    h, w, labels = inputs()
    loss, token_losses = linear_cross_entropy(h, w, labels, chunk=chunk)
    loss.backward()
    h64, w64, expected = oracle(h, w, labels, 0.0)
    expected.sum().backward()
    torch.testing.assert_close(token_losses.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h.grad.double(), h64.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(w.grad.double(), w64.grad, rtol=1e-5, atol=1e-5)
    assert sum(seen) == len(labels)
    with torch.no_grad():  # logits of a validation need no gradient, and none is computed
        seen.clear()
        linear_cross_entropy(h, w, labels, chunk=chunk)
    assert not seen


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


class Exchange:
    """Collectives between threads that stand for ranks."""

    def __init__(self, ranks):
        self.barrier, self.parts, self.calls = Barrier(ranks), [None] * ranks, 0

    def reduce(self, rank, tensor, combine):
        self.parts[rank] = tensor.clone()
        self.calls += rank == 0
        self.barrier.wait(10)
        tensor.copy_(combine(torch.stack(self.parts)))
        self.barrier.wait(10)
        return tensor

    def shard(self, rank, start, vocab):
        return VocabularyShard(
            start,
            vocab,
            lambda tensor: self.reduce(rank, tensor, lambda x: x.sum(0)),
            lambda tensor: self.reduce(rank, tensor, lambda x: x.amax(0)),
        )


def on_shards(h, w, labels, smoothing, chunk, cuts):
    """Loss, token losses and gradients of every shard; the calls of collectives."""
    ends = [0, *cuts, w.shape[0]]
    exchange = Exchange(len(cuts) + 1)

    def work(rank):
        start, end = ends[rank : rank + 2]
        own_h, own_w = h.detach().requires_grad_(), w.detach()[start:end].requires_grad_()
        shard = exchange.shard(rank, start, w.shape[0])
        loss, losses = linear_cross_entropy(own_h, own_w, labels, smoothing, chunk, shard)
        loss.backward()
        return loss.detach(), losses, own_h.grad, own_w.grad

    with ThreadPoolExecutor(len(cuts) + 1) as pool:
        return list(pool.map(work, range(len(cuts) + 1))), exchange.calls


@settings(deadline=None, max_examples=30)  # threads wait for each other
@given(
    tokens=st.integers(1, 9),
    vocab=st.integers(2, 12),
    chunk=st.integers(1, 10),
    smoothing=st.sampled_from([0.0, 0.1, 0.7]),
    data=st.data(),
)
def test_shards_of_the_vocabulary_together_are_the_whole(tokens, vocab, chunk, smoothing, data):
    cuts = sorted(data.draw(st.sets(st.integers(1, vocab - 1), min_size=1, max_size=3)))
    labels = data.draw(
        st.lists(
            st.integers(0, vocab - 1) | st.just(IGNORE_INDEX), min_size=tokens, max_size=tokens
        )
    )
    h, w, _ = inputs(tokens, 4, vocab, torch.float64)
    # Shards whose largest logits are far apart: the softmax must be shifted by the whole's.
    w = (w * torch.linspace(0.1, 30, vocab).unsqueeze(1)).detach()
    labels = torch.tensor(labels)
    found, calls = on_shards(h, w, labels, smoothing, chunk, cuts)
    h64, w64, expected = oracle(h, w, labels, smoothing)
    expected.sum().backward()
    close = dict(rtol=1e-11, atol=1e-11)
    for loss, losses, _, _ in found:
        torch.testing.assert_close(loss, expected.sum().detach(), **close)
        torch.testing.assert_close(losses, expected.detach(), **close)
    torch.testing.assert_close(sum(one[2] for one in found), h64.grad, **close)
    torch.testing.assert_close(torch.cat([one[3] for one in found]), w64.grad, **close)
    assert calls == 2 * -(-tokens // chunk)  # two small collectives a chunk


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_shards_in_bfloat16_stay_near_float32(smoothing):
    h, w, labels = inputs(dtype=torch.bfloat16)
    found, _ = on_shards(h, w, labels, smoothing, 8, [20])
    h64, w64, expected = oracle(h, w, labels, smoothing)
    expected.sum().backward()
    for loss, losses, grad_hidden, grad_weight in found:
        assert loss.dtype == losses.dtype == torch.float32
        assert grad_hidden.dtype == grad_weight.dtype == torch.bfloat16
        # As without shards.
        torch.testing.assert_close(loss.double(), expected.detach().sum(), rtol=5e-3, atol=0)
    torch.testing.assert_close(sum(one[2].double() for one in found), h64.grad, rtol=0, atol=0.05)
    torch.testing.assert_close(
        torch.cat([one[3] for one in found]).double(), w64.grad, rtol=0, atol=0.05
    )


def weighed(losses):
    """A sum in which the weight of a token depends on all the others."""
    return (losses.cumsum(0).tanh() * losses.flip(0)).sum()


@pytest.mark.parametrize('frozen', [None, 0, 1])
@pytest.mark.parametrize('chunk', [1, 8, 37, 1000])
def test_losses_of_tokens_are_differentiable(chunk, frozen):
    h, w, labels = inputs()
    if frozen is not None:
        (h, w)[frozen].requires_grad_(False)
    losses = linear_token_losses(h, w, labels, chunk)
    weighed(losses).backward()
    h64, w64, expected = oracle(h, w, labels, 0.0)
    weighed(expected).backward()
    assert losses.dtype == torch.float32 and losses.shape == labels.shape
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    for found, exact in ((h, h64), (w, w64)):
        if found.requires_grad:
            torch.testing.assert_close(found.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)
        else:
            assert found.grad is None


def test_numerical_gradient_of_the_losses_of_tokens():
    h, w, labels = inputs(tokens=5, hidden=3, vocab=7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: linear_token_losses(h, w, labels, 2), (h, w))


@pytest.mark.parametrize('frozen', [False, True])
def test_losses_of_tokens_never_hold_all_logits(frozen):
    h, w, labels = inputs(tokens=512, hidden=4, vocab=64)
    w.requires_grad_(not frozen)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        weighed(linear_token_losses(h, w, labels, chunk=64)).backward()
    assert largest == 64 * 64


def test_losses_of_tokens_in_bfloat16_stay_near_float32():
    h, w, labels = inputs(dtype=torch.bfloat16)
    weighed(linear_token_losses(h, w, labels, 8)).backward()
    h64, w64, expected = oracle(h, w, labels, 0.0)
    weighed(expected).backward()
    assert h.grad.dtype == w.grad.dtype == torch.bfloat16
    # As above; the weights of the tokens go up to about 10.
    torch.testing.assert_close(h.grad.double(), h64.grad, rtol=0, atol=0.5)
    torch.testing.assert_close(w.grad.double(), w64.grad, rtol=0, atol=0.5)


def test_losses_of_tokens_over_shards_of_the_vocabulary():
    h, w, labels = inputs(dtype=torch.float64)
    ends = [0, 7, 30, 50]
    exchange = Exchange(3)

    def work(rank):
        start, end = ends[rank : rank + 2]
        own_h, own_w = h.detach().requires_grad_(), w.detach()[start:end].requires_grad_()
        shard = exchange.shard(rank, start, 50)
        losses = linear_token_losses(own_h, own_w, labels, 8, shard)
        weighed(losses).backward()
        return losses.detach(), own_h.grad, own_w.grad

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(work, range(3)))
    h64, w64, expected = oracle(h, w, labels, 0.0)
    weighed(expected).backward()
    for losses, _, _ in found:
        torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(sum(one[1] for one in found), h64.grad)
    torch.testing.assert_close(torch.cat([one[2] for one in found]), w64.grad)
