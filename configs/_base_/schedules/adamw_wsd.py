"""AdamW, clipped, with warm-up, a plateau and a short decay: a run that can be prolonged."""

from mmengine.config import read_base

with read_base():
    from .adamw_cosine import *

from internlm_mm.optim import WarmupStableDecay

param_scheduler = [dict(type=WarmupStableDecay, warmup=2000, decay=10_000)]
