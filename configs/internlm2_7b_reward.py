"""InternLM2-Chat-7B or 2.5-Chat-7B as a reward model with LoRA, one GPU of 80 GB.

python tools/train.py configs/internlm2_7b_reward.py
"""

from mmengine.config import read_base

with read_base():
    from .internlm_7b_reward import *
    from ._base_.models.internlm2_7b import *

from internlm_mm.models import LoRA, PairwiseReward

load_from = 'internlm2_5-7b-chat'
tokenizer.update(path='internlm2_5-7b-chat')  # with tokenizer.model
model.update(
    max_seq_len=4096,
    adapter=dict(type=LoRA, rank=64, alpha=64.0, targets=['*_proj']),
    objective=dict(type=PairwiseReward, center=0.01),
)
train_dataloader.dataset.update(chat_template='internlm2')
val_dataloader.dataset.update(chat_template='internlm2')
