"""InternLM-7B with LoRA on random tokens: how fast one GPU of 80 GB trains adapters.

python tools/benchmark.py configs/internlm_7b_lora_speed.py
"""

from mmengine.config import read_base

with read_base():
    from .internlm_7b_speed import *

from internlm_mm.models import LoRA

model.update(adapter=dict(type=LoRA, rank=16, alpha=32.0))
train_cfg.update(global_batch_size=8)
optim_wrapper.optimizer.update(lr=2e-4, weight_decay=0.0)
