"""InternLM-Chat-7B by IPO with LoRA, on one GPU of 80 GB; all else as internlm_7b_dpo.py.

python tools/train.py configs/internlm_7b_ipo.py
"""

from mmengine.config import read_base

with read_base():
    from .internlm_7b_dpo import *

from internlm_mm.models import IPO

model.objective = dict(type=IPO, beta=0.1, reference='adapters_off')
