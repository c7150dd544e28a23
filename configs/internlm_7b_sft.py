"""InternLM-7B on conversations, all weights: 8 GPUs of 80 GB, 64 rows of 4096 tokens a step.

    torchrun --nproc-per-node 8 tools/train.py configs/internlm_7b_sft.py --launcher pytorch

`load_from` is a Hugging Face folder, a folder of InternLM's shards or a checkpoint of ours;
conversations lie in data/chat (docs/en/finetune.md).
"""

from mmengine.config import read_base

with read_base():
    from ._base_.datasets.conversations import *
    from ._base_.default_runtime import *
    from ._base_.models.internlm_7b import *
    from ._base_.schedules.adamw_finetune import *

from internlm_mm.engine import PerplexityLoop, TokenTrainLoop
from internlm_mm.engine.hooks import EvaluationHook

load_from = 'internlm-7b'
tokenizer.update(path='internlm-7b')  # with tokenizer.model
train_dataloader.dataset.update(chat_template='internlm')
val_dataloader.dataset.update(chat_template='internlm')
train_cfg = dict(type=TokenTrainLoop, max_iters=1000, global_batch_size=64, micro_batch_size=1)
val_cfg = dict(type=PerplexityLoop)
default_hooks.update(evaluation=dict(type=EvaluationHook, interval=200, at_start=True))
default_hooks.checkpoint.update(interval=500)
strategy.update(precision=dict(param='bfloat16', reduce='float32'), compile=True)
