"""InternLM2-7B and 2.5-7B: 7,737,708,544 parameters."""

from internlm_mm.models import InternLM2

model = dict(
    type=InternLM2,
    vocab_size=92_544,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    max_seq_len=32_768,
    rope_theta=1e6,
)
