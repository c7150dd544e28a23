"""Sizes of a model in InternLM's own checkpoints: from its config if readable, and from shapes."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from internlm_mm.checkpoint.internlm_files import Shards
from internlm_mm.checkpoint.internlm_layout import Kind
from internlm_mm.checkpoint.pickled import read_pickled
from internlm_mm.registry import MODELS
from internlm_mm.utils.suggest import did_you_mean

LOG = logging.getLogger(__name__)
CONFIG_NAME = 'model_config.pt'

# Keys that change what a model computes, and the one value that is done here.
_ONLY = {
    'norm_type': 'rmsnorm',
    'use_swiglu': True,
    'is_reward': False,
    'deepnorm': False,
    'num_experts': 1,
    'rotary_emb_scale_base': 0,
}
# InternEvo's settings that are no arguments of ours: they say how weights are stored.
_STORED = ('adapt_hf', 'norm_head')


class Sizes(NamedTuple):
    """What a folder says of its model.

    Attributes:
        config: What `MODELS.build` takes.
        head_dim: Width of a head.
        q_per_kv: Query heads that share a key/value head.
        adapt_hf: Whether rotary pairs lie half a head apart, as ours do.
        norm_head: Whether the head's rows are divided by their lengths.
    """

    config: dict[str, Any]
    head_dim: int
    q_per_kv: int
    adapt_hf: bool
    norm_head: bool


def read_sizes(shards: Shards, kind: Kind, settings: Mapping[str, Any]) -> Sizes:
    """Sizes of the model in a folder of shards.

    Args:
        shards: The files and names.
        kind: Of model.
        settings: What is said beside them, and wins: arguments of the model, adapt_hf, norm_head.

    Raises:
        ValueError: If a size is told by nothing, two disagree, or the model does what none here
            does.
    """
    _check_settings(kind, settings)
    said = _model_config(shards.folder)
    config: dict[str, Any] = {'type': kind.family, **_from_shapes(shards, kind)}
    for key, theirs in (
        ('num_layers', 'num_layers'),
        ('hidden_size', 'hidden_size'),
        ('vocab_size', 'vocab_size'),
    ):
        if said.get(theirs, config[key]) != config[key]:
            raise ValueError(
                f'{shards.folder}: {CONFIG_NAME} says {theirs}={said[theirs]}, but the shards hold '
                f'{config[key]}'
            )
    heads = _num_heads(shards, kind, said, settings, config['hidden_size'])
    head_dim = config['hidden_size'] // heads
    kv_heads = _num_kv_heads(shards, kind, heads, head_dim)
    if said.get('num_kv_attention_heads') not in (None, kv_heads):
        raise ValueError(
            f'{shards.folder}: {CONFIG_NAME} says num_kv_attention_heads='
            f'{said["num_kv_attention_heads"]}, but the shapes are those of {kv_heads}'
        )
    config['num_heads'] = heads
    if kind.packed != 'thirds':
        config['num_kv_heads'] = kv_heads
    has_biases = any(name.endswith('.bias') for name in shards.tensors)
    if has_biases != getattr(MODELS.get(kind.family), 'attention_bias', False):
        config['attention_bias'] = has_biases
    config |= {
        'max_seq_len': said.get('max_position_embeddings') or 2048,
        'rope_theta': float(said.get('rope_base') or 10_000.0),
        'norm_eps': float(said.get('layer_norm_epsilon') or 1e-5),
    }
    if said.get('use_dynamic_ntk_rope'):
        config['rope_scaling'] = {
            'rope_type': 'dynamic',
            'factor': 1.0,
            # Said, so that it stays where a longer `max_seq_len` is set.
            'original_max_position_embeddings': config['max_seq_len'],
        }
    config |= {key: value for key, value in settings.items() if key not in _STORED}
    for key, value in _from_shapes(shards, kind).items():
        if config[key] != value:
            raise ValueError(f'{key}={config[key]!r} was set, but the shards hold {value}')
    return Sizes(
        config,
        head_dim,
        heads // kv_heads,
        _adapt_hf(shards, kind, said, settings),
        bool(settings.get('norm_head', said.get('norm_head', False))),
    )


def _check_settings(kind: Kind, settings: Mapping[str, Any]) -> None:
    MODELS.import_from_location()
    family = MODELS.get(kind.family)
    known = [name for name in inspect.signature(family).parameters if name != 'objective']
    for key in settings:
        if key not in (*known, *_STORED):
            raise ValueError(
                f'{key}={settings[key]!r} is no setting of {kind.family}.'
                f'{did_you_mean(key, [*known, *_STORED])}'
            )


def _model_config(folder: Path) -> dict[str, Any]:
    """InternLM's own config of the model, or nothing where it cannot be read."""
    file = folder / CONFIG_NAME
    if not file.is_file():
        return {}
    try:
        said = read_pickled(file)
    except ValueError as error:
        LOG.warning(f'sizes are taken from shapes: {error}')
        return {}
    if not isinstance(said, Mapping):
        raise ValueError(f'{file} holds a {type(said).__name__}; expected keys and values')
    for key, value in _ONLY.items():
        if said.get(key, value) not in (value, None):
            raise ValueError(f'{file}: {key}={said[key]!r} is not done here, {value!r} is')
    return dict(said)


def _from_shapes(shards: Shards, kind: Kind) -> dict[str, int]:
    norm = next(name for name, ours in kind.layer.items() if ours == ('input_layernorm',))
    return {
        'vocab_size': shards.shape(f'{kind.head}.weight')[0] * shards.tensor_degree,
        'hidden_size': shards.shape(f'{kind.layers}.0.{norm}.weight')[0],
        'intermediate_size': shards.shape(f'{kind.layers}.0.{kind.mlp}.w1.weight')[0]
        * shards.tensor_degree,
        'num_layers': shards.num_layers,
    }


def _num_heads(
    shards: Shards, kind: Kind, said: Mapping[str, Any], settings: Mapping[str, Any], hidden: int
) -> int:
    heads = settings.get('num_heads', said.get('num_attention_heads'))
    if heads is None:
        name = f'{kind.layers}.0.{next(iter(kind.layer)).split(".")[0]}.rotary_emb.inv_freq'
        if name not in shards.tensors:
            raise ValueError(
                f'{shards.folder}: no file tells the number of heads; give it: --set num_heads=N'
            )
        heads = hidden // (2 * shards.shape(name)[0])
    if heads < 1 or hidden % heads or heads % shards.tensor_degree:
        raise ValueError(
            f'num_heads={heads} does not fit hidden_size={hidden} in {shards.tensor_degree} '
            f'tensor-parallel parts of {shards.folder}'
        )
    return heads


def _num_kv_heads(shards: Shards, kind: Kind, heads: int, head_dim: int) -> int:
    """Key/value heads, which the rows of projections tell."""
    if kind.packed == 'thirds':
        return heads
    module = 'attention.wqkv' if kind.packed else 'attention.wk'
    name = f'{kind.layers}.0.{module}.weight'
    rows = shards.shape(name)[0] * shards.tensor_degree
    if kind.packed:
        rows = (rows - heads * head_dim) // 2
    if rows <= 0 or rows % head_dim or heads % (rows // head_dim):
        raise ValueError(
            f'{shards.folder}: {name!r} has shape {list(shards.shape(name))} in each of '
            f'{shards.tensor_degree} parts, which no number of key/value heads of width '
            f'{head_dim} gives'
        )
    return rows // head_dim


def _adapt_hf(
    shards: Shards, kind: Kind, said: Mapping[str, Any], settings: Mapping[str, Any]
) -> bool:
    if kind.packed == 'thirds':
        return True
    # InternLM2's builder takes True where its config does not say; a config is needed for that.
    default = True if kind.packed and said else None
    adapt_hf = settings.get('adapt_hf', said.get('adapt_hf', default))
    if adapt_hf is None:
        raise ValueError(
            f'{shards.folder}: no file tells how rotary pairs lie; give it: --set adapt_hf=False '
            '(side by side: trained so by InternEvo, or from Meta) or --set adapt_hf=True (as in '
            'Hugging Face folders)'
        )
    return bool(adapt_hf)
