"""InternLM-7B on conversations, all weights, on one GPU of 80 GB with 128 GB of host memory.

    python tools/train.py configs/internlm_7b_offload_sft.py

Masters, gradients and moments lie in host memory, where the update runs; a step of many rows pays
for it. Begins with `load_from` and reads data/chat, as internlm_7b_sft.py (docs/en/finetune.md).
"""

from mmengine.config import read_base

with read_base():
    from .internlm_7b_sft import *

from internlm_mm.optim import CompactAdamW

optim_wrapper.optimizer = dict(
    type=CompactAdamW, state_dtype='bfloat16', lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0
)
strategy.update(
    offload=True,
    recompute='selective',
    kernels=dict(fuse_accumulation='auto'),  # micro-batches' gradients add up in their products
)
train_cfg.update(global_batch_size=16)
