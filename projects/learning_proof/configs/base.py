"""The base model: plain text of words, counting and sums."""

from mmengine.config import read_base

with read_base():
    from internlm_mm.configs._base_.datasets.pretrain_text import *
    from internlm_mm.configs._base_.schedules.adamw_cosine import *

    from ._base_.small_model import *

train_dataloader.dataset.update(
    seq_len=64,
    min_document_length=1,
    weights=dict(sums=0.45, repeats=0.2, talk=0.2, counting=0.1, orders=0.05),
)
train_dataloader.update(num_workers=0)
val_dataloader = None
train_cfg.update(max_iters=3000)
optim_wrapper.optimizer.update(lr=3e-3)
param_scheduler[0].update(warmup=50)
default_hooks.checkpoint.update(interval=None)
