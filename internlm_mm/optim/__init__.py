"""Optimizer wrapper, parameter groups, gradient norm and schedules."""

from internlm_mm.optim.apex_adam import FusedAdam
from internlm_mm.optim.compact_adamw import CompactAdamW
from internlm_mm.optim.hybrid_zero import HybridZeroOptimWrapper
from internlm_mm.optim.muon import MuonAdamW
from internlm_mm.optim.param_groups import DecayGroupsConstructor
from internlm_mm.optim.schedules import Beta2Schedule, WarmupCosine, WarmupStableDecay

__all__ = [
    'Beta2Schedule',
    'CompactAdamW',
    'DecayGroupsConstructor',
    'FusedAdam',
    'HybridZeroOptimWrapper',
    'MuonAdamW',
    'WarmupCosine',
    'WarmupStableDecay',
]
