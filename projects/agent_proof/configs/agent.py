"""A tiny InternLM2 from nothing, on conversations with tool calls."""

from mmengine.config import read_base

with read_base():
    from internlm_mm.configs._base_.datasets.conversations import *
    from internlm_mm.configs._base_.default_runtime import *
    from internlm_mm.configs._base_.schedules.muon_cosine import *

from internlm_mm.engine import TokenTrainLoop
from internlm_mm.models import InternLM2

model = dict(
    type=InternLM2,
    vocab_size=871,  # bytes, characters, words, syllables, JSON and code: see agent_proof/data.py
    hidden_size=192,
    intermediate_size=512,
    num_layers=6,
    num_heads=6,
    max_seq_len=512,
    rope_theta=10_000.0,
)
train_dataloader.dataset.update(seq_len=320, overlong='error')
train_dataloader.update(num_workers=0)
val_dataloader = None
visualizer.update(vis_backends=[dict(type=LocalVisBackend)])
train_cfg = dict(type=TokenTrainLoop, max_iters=3000, global_batch_size=64, micro_batch_size=64)
optim_wrapper.optimizer.update(lr=3e-3)
param_scheduler[0].update(warmup=100)
default_hooks.checkpoint.update(interval=750, keep_last=None, save_optimizer=False)
