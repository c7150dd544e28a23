"""All weights of the base model on conversations."""

from mmengine.config import read_base

with read_base():
    from internlm_mm.configs._base_.datasets.conversations import *
    from internlm_mm.configs._base_.schedules.adamw_finetune import *

    from ._base_.small_model import *

from internlm_mm.engine import PerplexityLoop
from internlm_mm.engine.hooks import EvaluationHook

train_dataloader.dataset.update(
    seq_len=64,
    weights=dict(copy=0.3, reverse=0.25, sort=0.25, add=0.2),
)
train_dataloader.update(num_workers=0)
val_dataloader.dataset.update(seq_len=64)
val_dataloader.update(micro_batch_size=16)
train_cfg.update(max_iters=1400)
val_cfg = dict(type=PerplexityLoop)
optim_wrapper.optimizer.update(lr=2e-3)
param_scheduler[0].update(warmup=50)
default_hooks.update(evaluation=dict(type=EvaluationHook, interval=350, at_start=True))
default_hooks.checkpoint.update(interval=350, keep_last=None, save_optimizer=False)
