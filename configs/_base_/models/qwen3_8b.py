"""Qwen3-8B: 8,190,735,360 parameters."""

from internlm_mm.models import Qwen3

model = dict(
    type=Qwen3,
    vocab_size=151_936,
    hidden_size=4096,
    intermediate_size=12_288,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_seq_len=40_960,
    rope_theta=1e6,
    norm_eps=1e-6,
)
