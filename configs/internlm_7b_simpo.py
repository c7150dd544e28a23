"""InternLM-Chat-7B by SimPO with LoRA, on one GPU of 80 GB: no frozen model is asked.

    python tools/train.py configs/internlm_7b_simpo.py

All else is as in internlm_7b_dpo.py. The loss is of log-probabilities per token, and its beta of
another size than DPO's.
"""

from mmengine.config import read_base

with read_base():
    from .internlm_7b_dpo import *

from internlm_mm.models import SimPO

model.objective = dict(type=SimPO, beta=2.0, gamma=1.0)
optim_wrapper.optimizer.update(lr=1e-6)
