"""InternLM-20B: 20,089,943,040 parameters."""

from mmengine.config import read_base

with read_base():
    from .internlm_7b import *

model.update(hidden_size=5120, intermediate_size=13_824, num_layers=60, num_heads=40)
