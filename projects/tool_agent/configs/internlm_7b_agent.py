"""InternLM-7B on conversations with tool calls in the protocol of InternLM-Chat 7B v1.1.

torchrun --nproc-per-node 8 tools/train.py projects/tool_agent/configs/internlm_7b_agent.py \
    --launcher pytorch

Reads data/agent/train and data/agent/validation, in any of the forms of docs/en/agents.md. This
protocol has one call a turn: what has several is an error, and is left out by
`train_dataloader.dataset.on_error=skip`.
"""

from mmengine.config import read_base

with read_base():
    from internlm_mm.configs.internlm_7b_sft import *

train_dataloader.dataset.update(path='data/agent/train', chat_template='internlm_v1_1')
val_dataloader.dataset.update(path='data/agent/validation', chat_template='internlm_v1_1')
