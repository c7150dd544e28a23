"""Arithmetic of the model: a torch reference first, kernels behind the same function."""

from internlm_mm.ops.attention import Documents, cached_attention, make_documents, needs_mask
from internlm_mm.ops.attention_choice import choose_attention
from internlm_mm.ops.cross_entropy import (
    VocabularyShard,
    linear_cross_entropy,
    linear_token_losses,
)
from internlm_mm.ops.document_scores import document_scores
from internlm_mm.ops.flash4 import flash4_attention
from internlm_mm.ops.flash_packages import flash2_attention, flash3_attention
from internlm_mm.ops.flex import flexible_attention
from internlm_mm.ops.four_bit import FourBitWeight, to_four_bit
from internlm_mm.ops.greedy import greedy_tokens
from internlm_mm.ops.kv_cache import KVCache, LayerCache
from internlm_mm.ops.liger import liger_cross_entropy
from internlm_mm.ops.low_rank import LowRank, low_rank_linear, merge_low_rank, row_norms
from internlm_mm.ops.projections import project
from internlm_mm.ops.rms_norm import rms_norm
from internlm_mm.ops.rope import apply_rope, rope_table
from internlm_mm.ops.swiglu import swiglu

__all__ = [
    'Documents',
    'FourBitWeight',
    'KVCache',
    'LayerCache',
    'LowRank',
    'VocabularyShard',
    'apply_rope',
    'cached_attention',
    'choose_attention',
    'document_scores',
    'flash2_attention',
    'flash3_attention',
    'flash4_attention',
    'flexible_attention',
    'greedy_tokens',
    'liger_cross_entropy',
    'linear_cross_entropy',
    'linear_token_losses',
    'low_rank_linear',
    'make_documents',
    'merge_low_rank',
    'needs_mask',
    'project',
    'rms_norm',
    'rope_table',
    'row_norms',
    'swiglu',
    'to_four_bit',
]
