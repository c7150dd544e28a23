"""InternLM-Chat-7B by DPO with LoRA, on one GPU of 80 GB: 16 rows of 4096 tokens a step.

    python tools/train.py configs/internlm_7b_dpo.py

`load_from` is a chat model: a Hugging Face folder, a folder of InternLM's shards or a checkpoint of
ours. The frozen model is the same one without its adapters, so no second one is held in memory.
Preferences lie in data/preferences (docs/en/preference.md).
"""

from mmengine.config import read_base

with read_base():
    from ._base_.datasets.preferences import *
    from ._base_.default_runtime import *
    from ._base_.models.internlm_7b import *
    from ._base_.schedules.adamw_finetune import *

from internlm_mm.engine import PreferenceLoop, TokenTrainLoop
from internlm_mm.engine.hooks import EvaluationHook
from internlm_mm.models import DPO, LoRA

load_from = 'internlm-chat-7b'
tokenizer.update(path='internlm-chat-7b')  # with tokenizer.model
model.update(
    adapter=dict(type=LoRA, rank=64, alpha=64.0, targets=['*_proj']),
    objective=dict(type=DPO, beta=0.1, reference='adapters_off'),
)
train_dataloader.dataset.update(chat_template='internlm')
val_dataloader.dataset.update(chat_template='internlm')
train_cfg = dict(type=TokenTrainLoop, max_iters=500, global_batch_size=16, micro_batch_size=1)
val_cfg = dict(type=PreferenceLoop)
optim_wrapper.optimizer.update(lr=5e-6)
default_hooks.update(evaluation=dict(type=EvaluationHook, interval=100, at_start=True))
default_hooks.checkpoint.update(interval=100)
strategy.update(precision=dict(param='bfloat16', reduce='float32'), compile=True)
