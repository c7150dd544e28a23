"""Every family, small, in each of its forms of a Hugging Face folder."""

from typing import Any

import torch
from torch import Tensor

from internlm_mm.models import (
    Family,
    InternLM,
    InternLM2,
    InternLM3,
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
)

SIZES = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    max_seq_len=64,
    rope_theta=5000.0,
    norm_eps=1e-5,
)
LLAMA3 = {
    'rope_type': 'llama3',
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 16,
}
YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 16}
LINEAR = {'rope_type': 'linear', 'factor': 2.0}
DYNAMIC = {'rope_type': 'dynamic', 'factor': 2.0}
FAMILIES: dict[str, tuple[type[Family], dict[str, Any]]] = {
    'InternLM': (InternLM, {}),
    'InternLM-20B': (InternLM, dict(attention_bias=False, rope_scaling=DYNAMIC)),
    'InternLM2': (InternLM2, dict(num_kv_heads=2, rope_scaling=DYNAMIC)),
    'InternLM2-bias': (InternLM2, dict(num_kv_heads=1, attention_bias=True)),
    'InternLM3': (InternLM3, dict(num_kv_heads=2, head_dim=16, rope_scaling=DYNAMIC)),
    'Llama': (Llama, dict(rope_scaling=LINEAR)),
    'Llama-3': (
        Llama,
        dict(num_kv_heads=2, head_dim=16, rope_scaling=LLAMA3, tie_word_embeddings=True),
    ),
    'Mistral': (Mistral, dict(num_kv_heads=2, head_dim=16)),
    'Qwen2': (Qwen2, dict(num_kv_heads=2, rope_scaling=YARN)),
    'Qwen2-tied': (Qwen2, dict(num_kv_heads=2, tie_word_embeddings=True)),
    'Qwen3': (Qwen3, dict(num_kv_heads=2, head_dim=16, rope_scaling=YARN)),
    'Qwen3-tied': (Qwen3, dict(num_kv_heads=2, head_dim=16, tie_word_embeddings=True)),
}
"""Families and arguments besides `SIZES`, by a name for the test."""

CASES = [(name, form.name) for name, (family, _) in FAMILIES.items() for form in family.hf_forms]
"""Names of `FAMILIES`, each with every form it has."""


def build(name: str, **changes: Any) -> Any:
    """One of `FAMILIES`, on the meta device."""
    family, options = FAMILIES[name]
    with torch.device('meta'):
        return family(**(SIZES | options | changes)).eval()


def form_of(name: str, form: str) -> Any:
    """A form of one of `FAMILIES`."""
    return next(one for one in FAMILIES[name][0].hf_forms if one.name == form)


def weights_of(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """Weights of a size that makes every part of a model matter, biases and norms included."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(parameter.shape, generator=generator) * 0.3
        for name, parameter in model.named_parameters()
    }
