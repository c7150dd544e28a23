"""Llama-3-8B on random tokens, rows of 8192: how fast this machine trains it, without data.

torchrun --nproc-per-node 2 tools/benchmark.py configs/llama3_8b_speed.py --launcher pytorch
"""

from mmengine.config import read_base

with read_base():
    from .internlm_7b_speed import *
    from ._base_.models.llama3_8b import *

train_dataloader.dataset.update(vocab_size=128_256, seq_len=8192)
train_cfg.update(global_batch_size=16, micro_batch_size=1)
