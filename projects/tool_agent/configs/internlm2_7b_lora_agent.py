"""InternLM2-7B or 2.5-7B on conversations with tool calls, with LoRA: one GPU of 80 GB.

    python tools/train.py projects/tool_agent/configs/internlm2_7b_lora_agent.py

Reads what internlm2_7b_agent.py reads.
"""

from mmengine.config import read_base

with read_base():
    from internlm_mm.configs.internlm2_7b_lora_sft import *

train_dataloader.dataset.update(path='data/agent/train')
val_dataloader.dataset.update(path='data/agent/validation')
