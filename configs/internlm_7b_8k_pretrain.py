"""InternLM-7B on rows of 8192 tokens: 512 of them a step, as many tokens as in the 7B run.

    srun python tools/train.py configs/internlm_7b_8k_pretrain.py --launcher slurm \
        --load-from hf/internlm-7b

Trained on 2048 positions before, the model goes on with rotary embeddings that are stretched by the
length of each document beyond that, as InternLM's own dynamic NTK does. About 72 GiB a GPU where 8
share the model.
"""

from mmengine.config import read_base

with read_base():
    from .internlm_7b_pretrain import *

model.update(
    max_seq_len=8192,
    rope_scaling=dict(rope_type='dynamic', factor=1.0, original_max_position_embeddings=2048),
    norm_eps=1e-6,  # of the published weights
)
train_dataloader.dataset.update(seq_len=8192)
val_dataloader.dataset.update(seq_len=8192)
train_cfg.update(max_iters=5000, global_batch_size=512)
optim_wrapper.optimizer.update(lr=4e-5)
param_scheduler[0].update(warmup=100)
strategy.update(recompute=0.5)
