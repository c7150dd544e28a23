"""Finished models at work."""

from internlm_mm.inference.generator import Generator, Sampling

__all__ = ['Generator', 'Sampling']
