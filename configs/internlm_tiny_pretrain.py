"""InternLM of 6.8M parameters on the standard library's source: what `make demo` trains.

    python tools/train.py configs/internlm_tiny_pretrain.py

4,096 tokens a step; about two minutes on two cores.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.datasets.python_stdlib import *
    from ._base_.default_runtime import *
    from ._base_.models.internlm_tiny import *
    from ._base_.schedules.adamw_cosine import *

from internlm_mm.engine import PerplexityLoop, TokenTrainLoop
from internlm_mm.engine.hooks import EvaluationHook

train_cfg = dict(type=TokenTrainLoop, max_iters=200, global_batch_size=8, micro_batch_size=8)
val_cfg = dict(type=PerplexityLoop)
val_dataloader.update(max_rows=64)
optim_wrapper.optimizer.update(lr=3e-3)
param_scheduler[0].update(warmup=20)
default_hooks.update(evaluation=dict(type=EvaluationHook, at_start=True))
