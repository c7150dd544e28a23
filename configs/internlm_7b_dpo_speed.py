"""InternLM-7B by DPO with LoRA on random pairs: how fast one GPU of 80 GB aligns it.

python tools/benchmark.py configs/internlm_7b_dpo_speed.py
"""

from mmengine.config import read_base

with read_base():
    from .internlm_7b_lora_speed import *

from internlm_mm.datasets import RandomPairs
from internlm_mm.models import DPO

model.update(objective=dict(type=DPO, beta=0.1, reference='adapters_off'))
train_dataloader.dataset = dict(type=RandomPairs, vocab_size=103_168, seq_len=4096)
train_cfg.update(micro_batch_size=1)
optim_wrapper.optimizer.update(lr=5e-6)
