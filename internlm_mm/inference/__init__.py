"""Finished models at work."""

from internlm_mm.inference.generator import Generator
from internlm_mm.inference.sampling import Sampling

__all__ = ['Generator', 'Sampling']
