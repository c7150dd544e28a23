"""A reward model from InternLM-Chat-7B with LoRA, on one GPU of 80 GB: 16 rows of 4096 a step.

    python tools/train.py configs/internlm_7b_reward.py

`load_from` is a chat model: a Hugging Face folder, a folder of InternLM's shards or a checkpoint of
ours; its head gives way to a score. Preferences lie in data/preferences (docs/en/preference.md).
"""

from mmengine.config import read_base

with read_base():
    from ._base_.datasets.preferences import *
    from ._base_.default_runtime import *
    from ._base_.models.internlm_7b import *
    from ._base_.schedules.adamw_finetune import *

from internlm_mm.engine import PreferenceLoop, TokenTrainLoop
from internlm_mm.engine.hooks import EvaluationHook
from internlm_mm.models import LoRA, PairwiseReward

load_from = 'internlm-chat-7b'
tokenizer.update(path='internlm-chat-7b')  # with tokenizer.model
model.update(
    adapter=dict(type=LoRA, rank=64, alpha=64.0, targets=['*_proj']),
    objective=dict(type=PairwiseReward, center=0.01),
)
# What is to be scored later ends as the template ends an answer, and not as a sample does.
_data = dict(chat_template='internlm', add_ending=False)
train_dataloader.dataset.update(**_data)
val_dataloader.dataset.update(**_data)
train_cfg = dict(type=TokenTrainLoop, max_iters=500, global_batch_size=16, micro_batch_size=1)
val_cfg = dict(type=PreferenceLoop)
optim_wrapper.optimizer.update(lr=5e-5)
default_hooks.update(evaluation=dict(type=EvaluationHook, interval=100, at_start=True))
default_hooks.checkpoint.update(interval=100)
strategy.update(precision=dict(param='bfloat16', reduce='float32'), compile=True)
