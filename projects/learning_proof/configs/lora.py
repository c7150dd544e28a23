"""Adapters over the frozen base model, on the same conversations."""

from mmengine.config import read_base

with read_base():
    from .sft import *

from internlm_mm.models import LoRA

model.update(adapter=dict(type=LoRA, rank=32, alpha=64.0))
train_cfg.update(max_iters=3000)
optim_wrapper.optimizer.update(lr=4e-3)
default_hooks.evaluation.update(interval=750)
default_hooks.checkpoint.update(interval=750)
