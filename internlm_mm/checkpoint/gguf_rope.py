"""Rotary embeddings of config.json in llama.cpp's words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def rope_metadata(config: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """Rotary embedding in llama.cpp's words.

    Args:
        config: The content of config.json.

    Returns:
        Keys of the file with their values, and what each frequency is divided by, [head_dim / 2],
        where the division differs between frequencies.

    Raises:
        ValueError: If llama.cpp's Llama has no such embedding.
    """
    rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
    theta = float(rope.get('rope_theta', config.get('rope_theta', 10_000.0)))
    kind = rope.get('rope_type', rope.get('type', 'default'))
    dim = head_dim_of(config)
    keys: dict[str, Any] = {'llama.rope.dimension_count': dim, 'llama.rope.freq_base': theta}
    if kind == 'default':
        return keys, None
    original = rope.get('original_max_position_embeddings') or config['max_position_embeddings']
    if kind == 'llama3':
        return keys, _llama3_divisors(rope, theta, dim, original)
    if kind not in ('linear', 'yarn'):
        raise ValueError(f'rope_type={kind!r} cannot be told to llama.cpp: it would go by default')
    factor = float(rope['factor'])
    keys |= {'llama.rope.scaling.type': kind, 'llama.rope.scaling.factor': factor}
    if kind == 'yarn':
        fixed = {'beta_fast': 32, 'beta_slow': 1, 'truncate': True}
        for name, value in fixed.items():
            if rope.get(name) not in (None, value):
                raise ValueError(f'yarn with {name}={rope[name]!r}: llama.cpp knows only {value!r}')
        keys['llama.rope.scaling.original_context_length'] = int(original)
        # llama.cpp multiplies cosines and sines by what YaRN proposes, and then by this.
        proposed = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        keys['llama.rope.scaling.attn_factor'] = _yarn_attention(rope, factor) / proposed
    return keys, None


def _yarn_attention(rope: Mapping[str, Any], factor: float) -> float:
    """What cosines and sines are multiplied by, as transformers reads it."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if rope.get('attention_factor') is not None:
        return float(rope['attention_factor'])
    weight, weight_all = rope.get('mscale'), rope.get('mscale_all_dim')
    return scale(weight) / scale(weight_all) if weight and weight_all else scale(1.0)


def _llama3_divisors(rope: Mapping[str, Any], theta: float, dim: int, original: int) -> Tensor:
    """Long wavelengths are stretched by the factor, short ones not, those between by parts."""
    wavelengths = 2 * math.pi * theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    low, high = float(rope['low_freq_factor']), float(rope['high_freq_factor'])
    share = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / float(rope['factor']) + share)).float()


def head_dim_of(config: Mapping[str, Any]) -> int:
    """Width of one head."""
    return config.get('head_dim') or config['hidden_size'] // config['num_attention_heads']
