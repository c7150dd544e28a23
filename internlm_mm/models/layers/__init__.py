"""Layers that families are assembled from."""

from internlm_mm.models.layers.attention import SelfAttention
from internlm_mm.models.layers.feed_forward import SwiGLU
from internlm_mm.models.layers.head import TiedHead
from internlm_mm.models.layers.norm import RMSNorm

__all__ = ['RMSNorm', 'SelfAttention', 'SwiGLU', 'TiedHead']
