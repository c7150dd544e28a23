"""The tiny InternLM of `make demo` on conversations of your own: a minute or two on two cores.

    python tools/train.py configs/internlm_tiny_sft.py

Reads data/chat/train and data/chat/validation, and begins with what `make demo` has trained;
`load_from=None` begins from nothing (docs/en/finetune.md).
"""

from mmengine.config import read_base

with read_base():
    from ._base_.datasets.conversations import *
    from ._base_.default_runtime import *
    from ._base_.models.internlm_tiny import *
    from ._base_.schedules.adamw_finetune import *

from internlm_mm.engine import PerplexityLoop, TokenTrainLoop
from internlm_mm.engine.hooks import EvaluationHook

load_from = 'work_dirs/demo'
tokenizer.update(path='data/python_stdlib/tokenizer')
train_cfg = dict(type=TokenTrainLoop, max_iters=300, global_batch_size=4, micro_batch_size=4)
val_cfg = dict(type=PerplexityLoop)
train_dataloader.dataset.update(seq_len=256, chat_template='internlm')
train_dataloader.update(num_workers=0)
val_dataloader.dataset.update(seq_len=256, chat_template='internlm')
optim_wrapper.optimizer.update(lr=2e-3)
param_scheduler[0].update(warmup=15)
default_hooks.update(evaluation=dict(type=EvaluationHook, interval=100, at_start=True))
default_hooks.checkpoint.update(interval=300)
