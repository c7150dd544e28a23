"""InternLM3-8B: 8,804,241,408 parameters."""

from internlm_mm.models import InternLM3

model = dict(
    type=InternLM3,
    vocab_size=128_512,
    hidden_size=4096,
    intermediate_size=10_240,
    num_layers=48,
    num_heads=32,
    num_kv_heads=2,
    head_dim=128,
    max_seq_len=32_768,
    rope_theta=5e7,
    rope_scaling=dict(rope_type='dynamic', factor=6.0),
)
