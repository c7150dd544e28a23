"""InternLM2-1.8B and 2.5-1.8B: 1,889,110,016 parameters."""

from internlm_mm.models import InternLM2

model = dict(
    type=InternLM2,
    vocab_size=92_544,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=24,
    num_heads=16,
    num_kv_heads=8,
    max_seq_len=32_768,
    rope_theta=1e6,
)
