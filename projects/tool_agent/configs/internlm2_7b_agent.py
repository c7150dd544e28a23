"""InternLM2-7B or 2.5-7B on conversations with tool calls, all weights.

torchrun --nproc-per-node 8 tools/train.py projects/tool_agent/configs/internlm2_7b_agent.py \
    --launcher pytorch

Reads data/agent/train and data/agent/validation, in any of the forms of docs/en/agents.md.
"""

from mmengine.config import read_base

with read_base():
    from internlm_mm.configs.internlm2_7b_sft import *

train_dataloader.dataset.update(path='data/agent/train')
val_dataloader.dataset.update(path='data/agent/validation')
