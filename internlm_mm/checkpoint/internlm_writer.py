"""Writing InternLM's own checkpoints, for those who go on with InternLM or InternEvo."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm_mm.checkpoint.hf_files import publish_folder
from internlm_mm.checkpoint.internlm_layout import (
    FORMATS,
    INTERNLM,
    KINDS,
    W2_IS_UP,
    Kind,
    Meaning,
    check_format,
    cut_dim,
    family_name,
    layout_of,
    split_evenly,
)
from internlm_mm.checkpoint.internlm_sizes import CONFIG_NAME
from internlm_mm.utils.suggest import did_you_mean


def write_internlm_shards(
    config: dict[str, Any],
    state: Mapping[str, Tensor],
    folder: str | Path,
    *,
    tp: int = 1,
    pp: int = 1,
    format: str = 'internlm-2023',
    num_chunks: int = 1,
    embed_split_hidden: bool = True,
    adapt_hf: bool = True,
    overwrite: bool = False,
) -> None:
    """Write `model_tp{t}_pp{p}.pt` and `model_config.pt`; one shard is in memory at a time.

    Args:
        config: Of an InternLM, InternLM2 or Llama, with all its sizes.
        state: Weights by our names.
        folder: The folder to make.
        tp: Tensor-parallel parts.
        pp: Pipeline stages.
        format: 'internlm-2023' or 'internevo'; InternLM2 and Llama are of the latter.
        num_chunks: Parts of a stage in an interleaved pipeline.
        embed_split_hidden: Whether the embedding is cut by columns, not by rows.
        adapt_hf: Whether rotary pairs stay half a head apart; InternLM has no choice.
        overwrite: Whether an existing folder is replaced.

    Raises:
        FileExistsError: If `folder` exists and `overwrite` is False.
        ValueError: If the model has no such form, or does not divide.
    """
    check_format(format, FORMATS)
    kind = _kind_of(config)
    if kind is not INTERNLM and format != 'internevo':
        raise ValueError(f'format={format!r} has no {kind.family}; internevo has')
    _stretched_from(config)  # refuses what has no place
    if config.get('tie_word_embeddings'):
        raise ValueError('tie_word_embeddings=True has no place in the format')
    heads = config['num_heads']
    kv_heads = config.get('num_kv_heads') or heads
    for key, size in (
        ('num_heads', heads),
        ('num_kv_heads', kv_heads),
        ('intermediate_size', config['intermediate_size']),
        ('hidden_size', config['hidden_size']),
        ('vocab_size', config['vocab_size']),
    ):
        if size % tp:
            raise ValueError(f'tp={tp} does not divide {key}={size}')
    head_dim = config['hidden_size'] // heads
    if config.get('head_dim') not in (None, head_dim):
        raise ValueError(f'head_dim={config["head_dim"]} has no place in the format')
    meaning = Meaning(head_dim, heads // kv_heads, W2_IS_UP[format], interleaved=not adapt_hf)
    layout = layout_of(kind, meaning)
    parts = split_evenly(config['num_layers'], pp, num_chunks)
    with publish_folder(Path(folder), overwrite) as staging:
        for p, chunks in enumerate(parts):
            for t in range(tp):
                shard: dict[str, Tensor] = {}
                for c, layers in enumerate(chunks):
                    ends = (p == 0 and c == 0, p == pp - 1 and c == num_chunks - 1)
                    names = _names_of(state, layers, *ends)
                    for stored, ours in layout.groups(names).items():
                        tensors = [_cut(state[o], o, t, tp, not embed_split_hidden) for o in ours]
                        packing = layout.packing(stored)
                        joined = tensors[0] if packing is None else packing.join(tensors)
                        local = _local(stored, kind, layers.start)
                        if not embed_split_hidden and kind is INTERNLM:
                            local = local.replace('embedding.', 'embedding.word_embeddings.')
                        prefix = f'{c}.model.' if num_chunks > 1 else 'model.'
                        shard[prefix + local] = joined.clone()
                torch.save(shard, staging / f'model_tp{t}_pp{p}.pt')
        torch.save(
            _model_config(config, kind, num_chunks, embed_split_hidden, adapt_hf),
            staging / CONFIG_NAME,
        )


def _kind_of(config: dict[str, Any]) -> Kind:
    name = family_name(config)
    kinds = {kind.family: kind for kind in KINDS}
    if name not in kinds:
        raise ValueError(
            f"{name} has no form in InternLM's checkpoints.{did_you_mean(name, kinds)}"
        )
    return kinds[name]


def _names_of(state: Mapping[str, Tensor], layers: range, first: bool, last: bool) -> list[str]:
    """Our names in one chunk."""
    names = []
    for name in state:
        if name.startswith('layers.'):
            inside = int(name.split('.')[1]) in layers
        else:
            inside = first if name.startswith('embed_tokens.') else last
        if inside:
            names.append(name)
    return names


def _cut(tensor: Tensor, name: str, part: int, degree: int, vocabulary_split: bool) -> Tensor:
    dim = cut_dim(name, vocabulary_split)
    return tensor if dim is None else tensor.chunk(degree, dim)[part]


def _local(stored: str, kind: Kind, start: int) -> str:
    """The name with the layer counted from the chunk's first one."""
    if not stored.startswith(f'{kind.layers}.'):
        return stored
    layers, number, rest = stored.split('.', 2)
    return f'{layers}.{int(number) - start}.{rest}'


def _stretched_from(config: Mapping[str, Any]) -> int | None:
    """The length that dynamic rotary embeddings, InternLM's only other ones, are stretched from.

    Raises:
        ValueError: If the format cannot say the config's `rope_scaling`.
    """
    scaling = dict(config.get('rope_scaling') or {'rope_type': 'default'})
    if scaling == {'rope_type': 'default'}:
        return None
    original = scaling.pop('original_max_position_embeddings', config.get('max_seq_len', 2048))
    if scaling != {'rope_type': 'dynamic', 'factor': 1.0}:
        raise ValueError(f'rope_scaling={config["rope_scaling"]!r} has no place in the format')
    return original


def _model_config(
    config: dict[str, Any], kind: Kind, num_chunks: int, embed_split_hidden: bool, adapt_hf: bool
) -> dict[str, Any]:
    said = {
        'num_chunks': num_chunks,
        'embed_split_hidden': embed_split_hidden,
        'num_layers': config['num_layers'],
        'hidden_size': config['hidden_size'],
        'vocab_size': config['vocab_size'],
        'num_attention_heads': config['num_heads'],
        'mlp_ratio': config['intermediate_size'] / config['hidden_size'],
        'multiple_of': 1,
        'layer_norm_epsilon': config.get('norm_eps', 1e-5),
        'norm_type': 'rmsnorm',
        'embed_grad_scale': 1,
        'parallel_output': True,
        'use_flash_attn': True,
        'no_bias': not config.get('attention_bias', kind.biased),
    }
    theta, longest = config.get('rope_theta', 10_000.0), config.get('max_seq_len', 2048)
    original = _stretched_from(config)
    if original is not None:
        longest = original
        said['use_dynamic_ntk_rope'] = True
    if kind is not INTERNLM:
        said['num_kv_attention_heads'] = config.get('num_kv_heads') or config['num_heads']
        said |= {'adapt_hf': adapt_hf, 'rope_base': theta, 'max_position_embeddings': longest}
    elif theta != 10_000.0 or longest != 2048:
        said |= {'rope_base': theta, 'max_position_embeddings': longest}
    return said
