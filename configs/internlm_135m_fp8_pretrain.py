"""`internlm_135m_pretrain` with matrix products in 8 bits: what fp8 does to a loss.

python tools/train.py configs/internlm_135m_fp8_pretrain.py
"""

from mmengine.config import read_base

with read_base():
    from .internlm_135m_pretrain import *
    from ._base_.fp8 import *
