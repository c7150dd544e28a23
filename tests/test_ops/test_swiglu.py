"""The gate against its formula."""

import torch

from internlm_mm.ops.swiglu import swiglu


def test_formula():
    gate, up = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(swiglu(gate, up), gate / (1 + (-gate).exp()) * up)


def test_bfloat16_stays_near_float32():
    gate, up = torch.randn(2, 64, 64)
    half = swiglu(gate.bfloat16(), up.bfloat16())
    torch.testing.assert_close(half.float(), swiglu(gate, up), rtol=3e-2, atol=1e-2)
