"""InternLM-20B from scratch: the 7B run with other sizes.

srun python tools/train.py configs/internlm_20b_pretrain.py --launcher slurm
"""

from mmengine.config import read_base

with read_base():
    from .internlm_7b_pretrain import *

model.update(hidden_size=5120, intermediate_size=13_824, num_layers=60, num_heads=40)
strategy.update(recompute=0.5)
