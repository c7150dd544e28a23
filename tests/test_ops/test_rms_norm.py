"""RMSNorm against Hugging Face's and float64."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from internlm_mm.ops.rms_norm import rms_norm


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
