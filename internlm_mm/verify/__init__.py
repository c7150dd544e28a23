"""Proof that a config trains the same on every layout: what `tools/verify_parallel.py` runs."""

from internlm_mm.verify.rows import UnevenRows

__all__ = ['UnevenRows']
