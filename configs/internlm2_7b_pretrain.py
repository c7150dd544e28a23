"""InternLM2-7B from scratch: the 7B run with other sizes, about 70 GiB a GPU where 8 share it.

srun python tools/train.py configs/internlm2_7b_pretrain.py --launcher slurm
"""

from mmengine.config import read_base

with read_base():
    from .internlm_7b_pretrain import *
    from ._base_.models.internlm2_7b import *

model.update(max_seq_len=4096)
strategy.update(recompute=0.25)
