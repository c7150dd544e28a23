"""The feed-forward layer against transformers'."""

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from internlm_mm.models.layers import SwiGLU


def test_same_as_transformers():
    ours = SwiGLU(16, 24)
    theirs = LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(x), theirs(x))
