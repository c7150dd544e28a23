"""A tiny reward model from the preferences of docs/en/preference.md: a minute or two.

    python tools/train.py configs/internlm_tiny_reward.py

Reads data/preferences/train and data/preferences/validation, and begins with a chat model, whose
head gives way to a score. All weights are trained.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.datasets.preferences import *
    from ._base_.default_runtime import *
    from ._base_.models.internlm_tiny import *
    from ._base_.schedules.adamw_finetune import *

from internlm_mm.engine import PreferenceLoop, TokenTrainLoop
from internlm_mm.engine.hooks import EvaluationHook
from internlm_mm.models import PairwiseReward

load_from = 'work_dirs/my_chat'
model.update(objective=dict(type=PairwiseReward))
tokenizer.update(path='data/python_stdlib/tokenizer')
train_cfg = dict(type=TokenTrainLoop, max_iters=60, global_batch_size=4, micro_batch_size=4)
val_cfg = dict(type=PreferenceLoop)
# What is to be scored later ends as the template ends an answer, and not as a sample does.
_data = dict(seq_len=256, chat_template='internlm', add_ending=False)
train_dataloader.dataset.update(**_data)
train_dataloader.update(num_workers=0)
val_dataloader.dataset.update(**_data)
optim_wrapper.optimizer.update(lr=2e-4)
param_scheduler[0].update(warmup=10)
default_hooks.update(evaluation=dict(type=EvaluationHook, interval=30, at_start=True))
default_hooks.checkpoint.update(interval=60)
