"""InternLM's own layouts of a Hugging Face folder: config.json, and how InternLM2 packs weights.

All functions are pure: dicts to dicts, tensors to tensors. On the other side of each is Llama's
layout, as `LlamaForCausalLM` of transformers 5 has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from internlm_mm.utils.weight_layout import Packing, Rule, WeightLayout

Config = Mapping[str, Any]

# Keys of Llama's config.json that InternLM's do not have; what they say must be said otherwise.
_ROPE_KEYS = {'rope_parameters', 'rope_scaling', 'rope_theta'}
_LLAMA_ONLY = {'attention_bias', 'mlp_bias', 'head_dim', 'attention_dropout', *_ROPE_KEYS}
# How a folder's files are read, which is not part of a model.
_READING = {'auto_map', 'attn_implementation', '_attn_implementation', '_name_or_path'}

# Defaults of InternLM's own configuration classes that Llama's do not have.
_DEFAULTS = {'vocab_size': 103_168, 'bias': True}
# InternLM's word for plain rotary embeddings.
_PLAIN = 'origin'


def to_internlm_config(llama_config: Config) -> dict[str, Any]:
    """The config.json of a first-generation InternLM that computes what this Llama does.

    Where InternLM has no word for a kind of rotary embedding (it knows `origin` and `dynamic`), the
    word of transformers and its settings are put into `rotary`; our modeling file reads them.

    Args:
        llama_config: The content of a config.json with `model_type: llama`.

    Raises:
        ValueError: If key heads are shared, heads have a width of their own, or the feed-forward
            layers have biases: the format cannot say so.
    """
    heads = llama_config['num_attention_heads']
    kv_heads = llama_config.get('num_key_value_heads') or heads
    if kv_heads != heads:
        raise ValueError(
            f"format 'internlm' has num_key_value_heads=num_attention_heads={heads}, "
            f"not {kv_heads}; 'internlm2' and 'llama' can say so"
        )
    rope = rope_of(llama_config)
    rotary: dict[str, Any] = {'base': rope.pop('rope_theta')}
    kind = rope.pop('rope_type')
    rotary['type'] = _PLAIN if kind == 'default' else kind
    if 'factor' in rope:
        rotary['scaling_factor'] = rope.pop('factor')
    return {
        **_named(llama_config, 'internlm', 'InternLMForCausalLM'),
        **_shared(llama_config, 'internlm', _LLAMA_ONLY | {'num_key_value_heads'}),
        'bias': bool(llama_config.get('attention_bias', False)),
        'rotary': rotary | rope,
    }


def from_internlm_config(config: Config) -> dict[str, Any]:
    """The config.json of the Llama that computes what this first-generation InternLM does.

    A config without `rotary` is of the first releases, which had plain rotary embeddings of base
    10000 only.

    Args:
        config: The content of a config.json with `model_type: internlm`.
    """
    config = _DEFAULTS | dict(config)
    rotary = {'base': 10_000.0, 'type': _PLAIN} | dict(config.pop('rotary', None) or {})
    kind = rotary.pop('type')
    rope = {'rope_type': 'default' if kind == _PLAIN else kind, 'rope_theta': rotary.pop('base')}
    factor = rotary.pop('scaling_factor', 1.0 if kind == 'dynamic' else None)
    if factor is not None:
        rope['factor'] = factor
    return _llama(config, rope | rotary)


def to_internlm2_config(llama_config: Config) -> dict[str, Any]:
    """The config.json of an InternLM2 that computes what this Llama does.

    Args:
        llama_config: The content of a config.json with `model_type: llama`.

    Raises:
        ValueError: If heads have a width of their own, or the feed-forward layers have biases: the
            format cannot say so.
    """
    rope = rope_of(llama_config)
    theta, kind = rope.pop('rope_theta'), rope.pop('rope_type')
    heads = llama_config['num_attention_heads']
    return {
        **_named(llama_config, 'internlm2', 'InternLM2ForCausalLM'),
        **_shared(llama_config, 'internlm2', _LLAMA_ONLY),
        'num_key_value_heads': llama_config.get('num_key_value_heads') or heads,
        'bias': bool(llama_config.get('attention_bias', False)),
        'rope_theta': theta,
        'rope_scaling': None if kind == 'default' else {'type': kind, **rope},
    }


def from_internlm2_config(config: Config) -> dict[str, Any]:
    """The config.json of the Llama that computes what this InternLM2 does.

    Args:
        config: The content of a config.json with `model_type: internlm2`.
    """
    config = _DEFAULTS | dict(config)
    return _llama(config, rope_of(config))


def internlm2_layout(num_heads: int, num_kv_heads: int) -> WeightLayout:
    """InternLM2's names, and its `wqkv` (see `pack_wqkv`).

    Args:
        num_heads: Query heads.
        num_kv_heads: Key/value heads.
    """

    def join(parts: Sequence[Tensor]) -> Tensor:
        q, k, v = parts
        return pack_wqkv(q, k, v, num_heads, num_kv_heads)

    wqkv = Packing(join, lambda tensor: unpack_wqkv(tensor, num_heads, num_kv_heads))
    qkv = tuple(f'layers.{{}}.self_attn.{name}_proj.' for name in 'qkv')
    names = {
        'layers.{}.self_attn.o_proj.': 'attention.wo.',
        'layers.{}.mlp.gate_proj.': 'feed_forward.w1.',
        'layers.{}.mlp.up_proj.': 'feed_forward.w3.',
        'layers.{}.mlp.down_proj.': 'feed_forward.w2.',
        'layers.{}.input_layernorm.': 'attention_norm.',
        'layers.{}.post_attention_layernorm.': 'ffn_norm.',
    }
    return WeightLayout(
        (
            Rule(('embed_tokens.',), 'model.tok_embeddings.'),
            Rule(qkv, 'model.layers.{}.attention.wqkv.', wqkv),
            *(Rule((ours,), f'model.layers.{{}}.{theirs}') for ours, theirs in names.items()),
            Rule(('norm.',), 'model.norm.'),
            Rule(('lm_head.',), 'output.'),
        ),
        ignored=('rotary_emb.inv_freq',),
    )


def pack_wqkv(q: Tensor, k: Tensor, v: Tensor, num_heads: int, num_kv_heads: int) -> Tensor:
    """InternLM2's one projection out of three.

    For every key/value head in turn: the rows of the query heads that share it, then those of the
    key, then those of the value.

    Args:
        q: Weight [num_heads * head_dim, hidden] or bias [num_heads * head_dim].
        k: The same with `num_kv_heads`.
        v: The same with `num_kv_heads`.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.

    Returns:
        [(num_heads + 2 * num_kv_heads) * head_dim, ...], in new memory.

    Raises:
        ValueError: If shapes and numbers of heads do not belong together.
    """
    head_dim = _head_dim(q.shape[0], num_heads, num_heads, num_kv_heads)
    rows = num_kv_heads * head_dim
    rest = q.shape[1:]
    if k.shape != v.shape or tuple(k.shape) != (rows, *rest):
        raise ValueError(
            f'k {list(k.shape)} and v {list(v.shape)} should be {[rows, *rest]}, as q is '
            f'{list(q.shape)} with num_heads={num_heads}, num_kv_heads={num_kv_heads}'
        )
    parts = [part.reshape(num_kv_heads, -1, head_dim, *rest) for part in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 2)


def unpack_wqkv(wqkv: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The three projections out of InternLM2's one; undoes `pack_wqkv`.

    Args:
        wqkv: Weight [(num_heads + 2 * num_kv_heads) * head_dim, hidden], or bias.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.

    Returns:
        q, k, v, each in new memory.

    Raises:
        ValueError: If shape and numbers of heads do not belong together.
    """
    head_dim = _head_dim(wqkv.shape[0], num_heads + 2 * num_kv_heads, num_heads, num_kv_heads)
    grouped = wqkv.unflatten(0, (num_kv_heads, -1, head_dim))
    q, k, v = grouped.split([num_heads // num_kv_heads, 1, 1], dim=1)
    return q.flatten(0, 2).clone(), k.flatten(0, 2).clone(), v.flatten(0, 2).clone()


def _head_dim(rows: int, heads: int, num_heads: int, num_kv_heads: int) -> int:
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f'num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}')
    if rows % heads:
        raise ValueError(
            f'{rows} rows are no whole number of heads: num_heads={num_heads}, '
            f'num_kv_heads={num_kv_heads}'
        )
    return rows // heads


def _named(llama_config: Config, model_type: str, architecture: str) -> dict[str, Any]:
    """The first lines of a config.json, after looking at those of `llama_config`."""
    if llama_config.get('model_type', 'llama') != 'llama':
        raise ValueError(f"model_type={llama_config['model_type']!r} is not 'llama'")
    return {'architectures': [architecture], 'model_type': model_type}


def _shared(llama_config: Config, name: str, dropped: set[str]) -> dict[str, Any]:
    """Llama's keys that the format has too.

    Raises:
        ValueError: If one that it has not says something.
    """
    width = llama_config['hidden_size'] // llama_config['num_attention_heads']
    implied = {'mlp_bias': False, 'head_dim': width, 'attention_dropout': 0.0}
    for key, value in implied.items():
        if llama_config.get(key) not in (None, value):
            raise ValueError(
                f'format {name!r} has {key}={value!r}, not {llama_config[key]!r}; '
                "format 'llama' can say so"
            )
    away = dropped | _READING | {'architectures', 'model_type'}
    return {key: value for key, value in llama_config.items() if key not in away}


def _llama(config: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """Llama's config.json from what the two formats share, and rotary settings in its spelling."""
    heads = config['num_attention_heads']
    away = {'bias', 'architectures', 'model_type', *_ROPE_KEYS, *_READING}
    return {
        'architectures': ['LlamaForCausalLM'],
        'model_type': 'llama',
        **{key: value for key, value in config.items() if key not in away},
        'num_key_value_heads': config.get('num_key_value_heads') or heads,
        'head_dim': config['hidden_size'] // heads,
        'attention_bias': bool(config['bias']),
        'mlp_bias': False,
        'attention_dropout': 0.0,
        # Both spellings: transformers 5 reads the second, servers of before it the first.
        'rope_theta': rope['rope_theta'],
        'rope_parameters': rope,
    }


def rope_of(config: Config) -> dict[str, Any]:
    """Rotary settings as transformers 5 spells them, from any of the spellings it knows.

    Args:
        config: The content of a config.json.

    Raises:
        ValueError: If they are no table.
    """
    # Where both spellings are there transformers takes the older, too.
    said = config.get('rope_scaling') or config.get('rope_parameters') or {}
    if not isinstance(said, Mapping):
        raise ValueError(f'rope_scaling={said!r} must be a table with a rope_type')
    kind = said.get('rope_type', said.get('type', 'default'))
    if not isinstance(kind, str):
        raise ValueError(f'rope_type={kind!r} must be the name of a kind')
    rope: dict[str, Any] = {'rope_type': kind}
    rope['rope_theta'] = said.get('rope_theta') or config.get('rope_theta') or 10_000.0
    rest = {key: value for key, value in said.items() if key not in (*rope, 'type')}
    return rope | rest
