"""Qwen2-7B and Qwen2.5-7B: 7,615,616,512 parameters."""

from internlm_mm.models import Qwen2

model = dict(
    type=Qwen2,
    vocab_size=152_064,
    hidden_size=3584,
    intermediate_size=18_944,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    max_seq_len=131_072,
    rope_theta=1e6,
    norm_eps=1e-6,
)
