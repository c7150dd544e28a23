"""The tiny InternLM of docs/en/preference.md, by DPO with LoRA: a few minutes on two cores.

    python tools/train.py configs/internlm_tiny_dpo.py

Reads data/preferences/train and data/preferences/validation, and begins with a chat model. The
frozen model is the same one without its adapters.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.datasets.preferences import *
    from ._base_.default_runtime import *
    from ._base_.models.internlm_tiny import *
    from ._base_.schedules.adamw_finetune import *

from internlm_mm.engine import PreferenceLoop, TokenTrainLoop
from internlm_mm.engine.hooks import EvaluationHook
from internlm_mm.models import DPO, LoRA

load_from = 'work_dirs/my_chat'
model.update(
    adapter=dict(type=LoRA, rank=16, alpha=32.0),
    objective=dict(type=DPO, beta=0.3, reference='adapters_off', sft_weight=1.0),
)
tokenizer.update(path='data/python_stdlib/tokenizer')
train_cfg = dict(type=TokenTrainLoop, max_iters=150, global_batch_size=4, micro_batch_size=4)
val_cfg = dict(type=PreferenceLoop)
train_dataloader.dataset.update(seq_len=256, chat_template='internlm')
train_dataloader.update(num_workers=0)
val_dataloader.dataset.update(seq_len=256, chat_template='internlm')
optim_wrapper.optimizer.update(lr=5e-4)
param_scheduler[0].update(warmup=10)
default_hooks.update(evaluation=dict(type=EvaluationHook, interval=50, at_start=True))
default_hooks.checkpoint.update(interval=150)
