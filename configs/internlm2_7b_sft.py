"""InternLM2-7B or 2.5-7B on conversations, with functions where they have them, all weights.

torchrun --nproc-per-node 8 tools/train.py configs/internlm2_7b_sft.py --launcher pytorch
"""

from mmengine.config import read_base

with read_base():
    from .internlm_7b_sft import *
    from ._base_.models.internlm2_7b import *

load_from = 'internlm2_5-7b'
model.update(max_seq_len=4096)
tokenizer.update(path='internlm2_5-7b')  # with tokenizer.model
train_dataloader.dataset.update(chat_template='internlm2')
val_dataloader.dataset.update(chat_template='internlm2')
strategy.update(recompute=0.25)
