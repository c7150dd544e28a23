"""InternLM of 3.3M parameters on the standard library's source: what `make demo` trains.

    python tools/train.py configs/internlm_tiny_pretrain.py

2,048 tokens a step; two to three minutes on two cores.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.datasets.python_stdlib import *
    from ._base_.default_runtime import *
    from ._base_.models.internlm_tiny import *
    from ._base_.schedules.adamw_cosine import *

from internlm_mm.engine import PerplexityLoop, TokenTrainLoop
from internlm_mm.engine.hooks import EvaluationHook

train_cfg = dict(type=TokenTrainLoop, max_iters=450, global_batch_size=8, micro_batch_size=8)
val_cfg = dict(type=PerplexityLoop)
train_dataloader.dataset.update(seq_len=256)
val_dataloader.dataset.update(seq_len=256)
val_dataloader.update(max_rows=64)
optim_wrapper.optimizer.update(lr=4e-3)
param_scheduler[0].update(warmup=30)
default_hooks.update(evaluation=dict(type=EvaluationHook, interval=150, at_start=True))
default_hooks.checkpoint.update(interval=150)
