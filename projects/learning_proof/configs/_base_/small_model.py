"""What all runs share: an InternLM2 of 0.6M parameters, the runtime, 16 rows a step."""

from mmengine.config import read_base

with read_base():
    from internlm_mm.configs._base_.default_runtime import *

from internlm_mm.engine import TokenTrainLoop
from internlm_mm.models import InternLM2

model = dict(
    type=InternLM2,
    vocab_size=299,  # bytes, characters, marks and words: see learning_proof/data.py
    hidden_size=128,
    intermediate_size=256,
    num_layers=3,
    num_heads=4,
    max_seq_len=128,
    rope_theta=10_000.0,
)
visualizer.update(vis_backends=[dict(type=LocalVisBackend)])
train_cfg = dict(type=TokenTrainLoop, max_iters=1000, global_batch_size=16, micro_batch_size=16)
