"""Muon for the matrices of the layers and AdamW for the rest, at AdamW's rate and schedule."""

from mmengine.config import read_base

with read_base():
    from .adamw_cosine import *

from internlm_mm.optim import MuonAdamW

optim_wrapper.update(
    optimizer=dict(type=MuonAdamW, lr=3e-4, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
)
