"""One model, any layout: parallelism is applied from outside."""

from internlm_mm.parallel.strategy import HybridParallelStrategy

__all__ = ['HybridParallelStrategy']
