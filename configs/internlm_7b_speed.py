"""InternLM-7B on random tokens: how fast this machine trains it, without data or tokenizer.

torchrun --nproc-per-node 2 tools/benchmark.py configs/internlm_7b_speed.py --launcher pytorch
"""

from mmengine.config import read_base

with read_base():
    from .internlm_7b_pretrain import *
    from ._base_.datasets.random_tokens import *

tokenizer = None
val_dataloader = None
val_cfg = None
train_cfg.update(max_iters=20, global_batch_size=32, micro_batch_size=2)
param_scheduler[0].update(warmup=5)
default_hooks.update(checkpoint=None, evaluation=None)
