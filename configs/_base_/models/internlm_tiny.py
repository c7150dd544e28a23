"""An InternLM small enough to train on a laptop's CPU: 3,347,136 parameters."""

from internlm_mm.models import InternLM

model = dict(
    type=InternLM,
    vocab_size=4096,
    hidden_size=192,
    intermediate_size=512,
    num_layers=4,
    num_heads=3,
    max_seq_len=512,
)
