"""InternLM-7B on tool calls in the protocol of InternLM-Chat 7B v1.1, with LoRA: one GPU of 80 GB.

    python tools/train.py projects/tool_agent/configs/internlm_7b_lora_agent.py

Reads what internlm_7b_agent.py reads.
"""

from mmengine.config import read_base

with read_base():
    from internlm_mm.configs.internlm_7b_lora_sft import *

train_dataloader.dataset.update(path='data/agent/train', chat_template='internlm_v1_1')
val_dataloader.dataset.update(path='data/agent/validation', chat_template='internlm_v1_1')
