"""The tiny InternLM of `make demo` on conversations of your own with LoRA: a minute on two cores.

python tools/train.py configs/internlm_tiny_lora_sft.py
"""

from mmengine.config import read_base

with read_base():
    from .internlm_tiny_sft import *

from internlm_mm.models import LoRA

model.update(adapter=dict(type=LoRA, rank=8, alpha=16.0))
optim_wrapper.optimizer.update(lr=1e-2)
