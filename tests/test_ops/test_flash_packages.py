"""FlashAttention 2 and 3 over stand-ins with their packages' signatures."""

import pytest
import torch

from internlm_mm.ops.attention import make_documents
from internlm_mm.ops.attention_choice import attention_obstacles
from internlm_mm.registry import ATTENTIONS
from tests import flash_standins
from tests.attention_cases import LENGTHS, oracle, packed_batch, qkv


@pytest.mark.parametrize('kv_heads', [4, 2])
@pytest.mark.parametrize('lengths', [LENGTHS, [[16]] * 3], ids=['packed', 'dense'])
@pytest.mark.parametrize('name', ['flash2', 'flash3'])
def test_values_and_gradients(name, lengths, kv_heads, monkeypatch):
    flash_standins.install(monkeypatch, name)
    inputs = qkv(kv_heads=kv_heads)
    batch = packed_batch(lengths, max_docs=4 if lengths is LENGTHS else 1)
    out = ATTENTIONS.get(name)(*inputs, make_documents(batch, need_mask=False))
    expected = oracle(*inputs, lengths)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, weight)
    wanted = torch.autograd.grad(expected, inputs, weight.double())
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want.float(), rtol=1e-4, atol=1e-5)


def test_flash3_is_for_hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (10, 0))
    (age, package) = attention_obstacles('flash3', 'cuda', torch.bfloat16, True)
    assert age == 'needs a GPU of sm_9x, not sm_100' and 'not installed' in package
