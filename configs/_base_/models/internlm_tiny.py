"""An InternLM small enough to train on a laptop's CPU: 6,849,792 parameters."""

from internlm_mm.models import InternLM

model = dict(
    type=InternLM,
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=688,
    num_layers=6,
    num_heads=4,
    max_seq_len=512,
)
