"""Llama-3-8B on random tokens with matrix products in 8 bits: how fast this machine trains it.

torchrun --nproc-per-node 2 tools/benchmark.py configs/llama3_8b_fp8_speed.py --launcher pytorch
"""

from mmengine.config import read_base

with read_base():
    from .llama3_8b_speed import *
    from ._base_.fp8 import *
