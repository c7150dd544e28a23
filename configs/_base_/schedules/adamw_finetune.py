"""AdamW at a low rate without weight decay: what is there already is to be kept."""

from mmengine.config import read_base

with read_base():
    from .adamw_cosine import *

optim_wrapper.optimizer.update(lr=1e-5, weight_decay=0.0)
param_scheduler[0].update(warmup=50)
