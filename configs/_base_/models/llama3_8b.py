"""Llama-3-8B: 8,030,261,248 parameters."""

from internlm_mm.models import Llama

model = dict(
    type=Llama,
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    max_seq_len=8192,
    rope_theta=5e5,
)
