"""InternLM-7B: 7,321,948,160 parameters."""

from internlm_mm.models import InternLM

model = dict(
    type=InternLM,
    vocab_size=103_168,
    hidden_size=4096,
    intermediate_size=11_008,
    num_layers=32,
    num_heads=32,
    max_seq_len=4096,
)
