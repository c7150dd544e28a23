"""InternLM-7B on conversations with LoRA over all linear layers: one GPU of 80 GB.

    python tools/train.py configs/internlm_7b_lora_sft.py

Begins with `load_from` and reads data/chat, as internlm_7b_sft.py; checkpoints hold the adapters
alone (docs/en/finetune.md).
"""

from mmengine.config import read_base

with read_base():
    from .internlm_7b_sft import *

from internlm_mm.models import LoRA

model.update(adapter=dict(type=LoRA, rank=16, alpha=32.0))
train_cfg.update(global_batch_size=16)
optim_wrapper.optimizer.update(lr=2e-4)
