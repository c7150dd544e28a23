"""InternLM2-20B and 2.5-20B: 19,861,149,696 parameters."""

from internlm_mm.models import InternLM2

model = dict(
    type=InternLM2,
    vocab_size=92_544,
    hidden_size=6144,
    intermediate_size=16_384,
    num_layers=48,
    num_heads=48,
    num_kv_heads=8,
    max_seq_len=32_768,
    rope_theta=1e6,
)
