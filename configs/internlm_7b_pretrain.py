"""InternLM-7B from scratch: 1024 rows of 4096 = 4.2M tokens a step, 1.05T tokens in all.

    srun python tools/train.py configs/internlm_7b_pretrain.py --launcher slurm

Data and tokenizer are made with tools/train_tokenizer.py and tools/preprocess_data.py
(docs/en/data.md).
"""

from mmengine.config import read_base

with read_base():
    from ._base_.datasets.pretrain_text import *
    from ._base_.default_runtime import *
    from ._base_.models.internlm_7b import *
    from ._base_.schedules.adamw_cosine import *

from internlm_mm.engine import PerplexityLoop, TokenTrainLoop
from internlm_mm.engine.hooks import EvaluationHook

model.update(max_seq_len=4096)
train_dataloader.dataset.update(seq_len=4096)
val_dataloader.dataset.update(seq_len=4096)
train_cfg = dict(type=TokenTrainLoop, max_iters=250_000, global_batch_size=1024, micro_batch_size=1)
val_cfg = dict(type=PerplexityLoop)
default_hooks.update(evaluation=dict(type=EvaluationHook, interval=1000))
strategy.update(
    precision=dict(param='bfloat16', reduce='float32'),
    compile=True,
    kernels=dict(fuse_accumulation='auto'),  # micro-batches' gradients add up in their products
)
