"""The tiny InternLM of `make demo` on conversations with tool calls: minutes on two cores.

    python tools/train.py projects/tool_agent/configs/internlm_tiny_agent.py

Reads data/agent/train and data/agent/validation, and begins with what `make demo` has trained. At
every evaluation the calls of 100 held-out answers are scored, too.
"""

from mmengine.config import read_base

with read_base():
    from internlm_mm.configs.internlm_tiny_sft import *

from internlm_mm.evaluation import ToolCallTask

model.update(max_seq_len=2048)  # declarations of functions are long in its small vocabulary
train_dataloader.dataset.update(
    path='data/agent/train', seq_len=1024, chat_template='internlm_v1_1'
)
val_dataloader.dataset.update(
    path='data/agent/validation', seq_len=1024, chat_template='internlm_v1_1'
)
val_cfg.update(
    tasks=[
        dict(
            type=ToolCallTask,
            path='data/agent/validation',
            chat_template='internlm_v1_1',
            max_samples=100,
            max_new_tokens=128,
            on_error='skip',
        )
    ]
)
