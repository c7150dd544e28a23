"""InternLM-7B on random tokens on one GPU of 80 GB, offloaded: how fast this machine trains it.

python tools/benchmark.py configs/internlm_7b_offload_speed.py
"""

from mmengine.config import read_base

with read_base():
    from .internlm_7b_speed import *

from internlm_mm.optim import CompactAdamW

optim_wrapper.optimizer = dict(
    type=CompactAdamW, state_dtype='bfloat16', lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1
)
strategy.update(offload=True, recompute='selective')
train_cfg.update(global_batch_size=16, micro_batch_size=1)
