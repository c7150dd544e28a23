"""Mistral-7B-v0.3: 7,248,023,552 parameters."""

from internlm_mm.models import Mistral

model = dict(
    type=Mistral,
    vocab_size=32_768,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    max_seq_len=32_768,
    rope_theta=1e6,
)
