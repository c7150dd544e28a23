"""What a run will need, reckoned from sizes alone: pure arithmetic, no tensors."""

from internlm_mm.planner.memory import MemoryPrediction, predict_memory
from internlm_mm.planner.sizes import ModelSizes, RunSizes, StateSize

__all__ = ['MemoryPrediction', 'ModelSizes', 'RunSizes', 'StateSize', 'predict_memory']
