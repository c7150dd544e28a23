"""The tiny InternLM of `make demo` on conversations with tool calls: minutes on two cores.

    python tools/train.py projects/tool_agent/configs/internlm_tiny_agent.py

Reads data/agent/train and data/agent/validation, and begins with what `make demo` has trained.
"""

from mmengine.config import read_base

with read_base():
    from internlm_mm.configs.internlm_tiny_sft import *

train_dataloader.dataset.update(
    path='data/agent/train', seq_len=1024, chat_template='internlm_v1_1'
)
val_dataloader.dataset.update(
    path='data/agent/validation', seq_len=1024, chat_template='internlm_v1_1'
)
