"""InternLM of 134M parameters on your own text: 16,384 tokens a step, minutes on one GPU.

    python tools/train.py configs/internlm_135m_pretrain.py

The smallest model that says something about precision, schedules and data. Data and tokenizer are
made with tools/train_tokenizer.py --vocab-size 32000 and tools/preprocess_data.py
(docs/en/data.md).
"""

from mmengine.config import read_base

with read_base():
    from ._base_.datasets.pretrain_text import *
    from ._base_.default_runtime import *
    from ._base_.models.internlm_tiny import *
    from ._base_.schedules.adamw_cosine import *

from internlm_mm.engine import PerplexityLoop, TokenTrainLoop
from internlm_mm.engine.hooks import EvaluationHook

model.update(
    vocab_size=32_000,
    hidden_size=768,
    intermediate_size=2048,
    num_layers=12,
    num_heads=12,
    max_seq_len=2048,
)
train_dataloader.dataset.update(seq_len=2048)
val_dataloader.dataset.update(seq_len=2048)
val_dataloader.update(micro_batch_size=8)
train_cfg = dict(type=TokenTrainLoop, max_iters=1000, global_batch_size=8, micro_batch_size=8)
val_cfg = dict(type=PerplexityLoop)
optim_wrapper.optimizer.update(lr=6e-4)
param_scheduler[0].update(warmup=100)
default_hooks.update(evaluation=dict(type=EvaluationHook, interval=250))
strategy.update(precision=dict(param='bfloat16', reduce='float32'), compile=True)
