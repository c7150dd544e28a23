"""The forms that Hugging Face has for our families: config.json and the names of weights.

Between a form and a model stands Llama's config.json (`llama_config`, `arguments_of`): every form
tells only how it differs from that. A family lists its forms as `hf_forms`, its own first;
`internlm_mm.checkpoint` reads that and never imports a model.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from internlm_mm.models.hf_layouts import (
    from_internlm2_config,
    from_internlm_config,
    internlm2_layout,
    rope_of,
    to_internlm2_config,
    to_internlm_config,
)
from internlm_mm.ops.rope import read_scaling
from internlm_mm.utils.weight_layout import WeightLayout

Config = Mapping[str, Any]

LLAMA_NAMES = {
    'embed_tokens.': 'model.embed_tokens.',
    'layers.': 'model.layers.',
    'norm.': 'model.norm.',
    'lm_head.': 'lm_head.',
}
COMPUTED = ('rotary_emb.inv_freq',)  # stored by old exporters; computed here
_SIZES = {
    'vocab_size': 'vocab_size',
    'hidden_size': 'hidden_size',
    'intermediate_size': 'intermediate_size',
    'num_hidden_layers': 'num_layers',
    'num_attention_heads': 'num_heads',
}
_KEPT_LENGTH = ('llama3', 'yarn')  # kinds of rotary embedding that need the length of before


def llama_layout(
    num_heads: int,  # noqa: ARG001  nothing is packed, so heads do not matter
    num_kv_heads: int,  # noqa: ARG001
) -> WeightLayout:
    """Llama's names, which most families share."""
    return WeightLayout.of_names(LLAMA_NAMES, COMPUTED)


@dataclass(frozen=True)
class HFForm:
    """One form of a model in a Hugging Face folder.

    Attributes:
        name: What `convert2hf --format` calls it.
        model_type: As in config.json.
        architecture: The class for causal language modelling.
        from_llama: Makes the content of config.json from Llama's, but for the two above.
        to_llama: The way back; gives Llama's keys, whatever the form does not say left out.
        layout: Names and packings of weights, for a number of heads and of key/value heads.
        aliases: Further pairs of model_type and architecture that mean this form.
        defaults: What holds where config.json does not say.
    """

    name: str
    model_type: str
    architecture: str
    from_llama: Callable[[dict[str, Any]], dict[str, Any]]
    to_llama: Callable[[Config], dict[str, Any]]
    layout: Callable[[int, int], WeightLayout] = llama_layout
    aliases: tuple[tuple[str, str], ...] = ()
    defaults: Config = field(default_factory=dict)

    def config(self, llama: dict[str, Any]) -> dict[str, Any]:
        """The content of config.json, from Llama's (see `llama_config`)."""
        named = {'architectures': [self.architecture], 'model_type': self.model_type}
        return named | self.from_llama(llama)

    def config_of(self, model: Any) -> dict[str, Any]:
        """The content of config.json of a model, but for token ids and dtype."""
        return self.config(llama_config(model))

    def describes(self, config: Config) -> bool:
        """Whether `config` is of this form."""
        kind, named = config.get('model_type'), config.get('architectures')
        named = named if isinstance(named, list) else []
        if not named:
            return kind == self.model_type
        pairs = ((self.model_type, self.architecture), *self.aliases)
        return any(kind in (None, one) and other in named for one, other in pairs)

    def arguments(self, family: type, config: Config) -> dict[str, Any]:
        """Arguments of a family's constructor that give the model of a config.json.

        Args:
            family: A model class that has this form.
            config: The content of config.json.

        Raises:
            ValueError: If the config is incomplete, or asks for something that is not done here.
        """
        config = {**self.defaults, **config}
        for key in _SIZES:
            if key not in config:
                raise ValueError(f'the key {key!r} is missing')
            if type(config[key]) is not int or config[key] < 1:
                raise ValueError(f'{key}={config[key]!r} must be a positive integer')
        if config.get('quantization_config'):
            raise ValueError('quantization_config: weights are read only as they were before that')
        return arguments_of(family, self.to_llama(config))


def llama_config(model: Any) -> dict[str, Any]:
    """The content of a Llama's config.json, but for token ids and dtype, which the exporter adds.

    Args:
        model: Of any family; only its settings are looked at.
    """
    rope = {'rope_type': 'default', **(model.rope_scaling or {})}
    longest = model.max_seq_len
    if rope['rope_type'] == 'dynamic':
        # Others stretch beyond `max_position_embeddings`, whatever else is said.
        longest = rope.pop('original_max_position_embeddings', longest)
    return {
        'vocab_size': model.vocab_size,
        'hidden_size': model.hidden_size,
        'intermediate_size': model.intermediate_size,
        'num_hidden_layers': len(model.layers),
        'num_attention_heads': model.num_heads,
        'num_key_value_heads': model.num_kv_heads,
        'head_dim': model.head_dim,
        'max_position_embeddings': longest,
        'rms_norm_eps': model.norm_eps,
        'hidden_act': 'silu',
        'attention_bias': model.attention_bias,
        'mlp_bias': False,
        'tie_word_embeddings': model.tie_word_embeddings,
        'attention_dropout': 0.0,
        'initializer_range': model.init.projection,
        'rope_parameters': {
            'rope_type': rope.pop('rope_type'),
            'rope_theta': model.rope_theta,
            **rope,
        },
        'use_cache': True,
    }


def arguments_of(family: type, llama: Config) -> dict[str, Any]:
    """Arguments of a family's constructor, from the content of a Llama's config.json.

    Args:
        family: A model class. What its constructor has no argument for must be as it has it.
        llama: The config; without a key for a bias, the family's own way is meant.

    Raises:
        ValueError: If the config asks for something that this family does not do.
    """
    for key, value in {'hidden_act': 'silu', 'mlp_bias': False}.items():
        if llama.get(key, value) != value:
            raise ValueError(f'{key}={llama[key]!r}: only {value!r} is done here')
    heads, width = llama['num_attention_heads'], llama['hidden_size']
    for key in ('num_key_value_heads', 'head_dim', 'max_position_embeddings'):
        value = llama.get(key)
        is_said = key in llama and (value is not None or key == 'max_position_embeddings')
        if is_said and (type(value) is not int or value < 1):
            raise ValueError(f'{key}={value!r} must be a positive integer')
    rope = rope_of(llama)
    for key, value in {
        'rope_theta': rope['rope_theta'],
        'rms_norm_eps': llama.get('rms_norm_eps', 1e-6),
    }.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f'{key}={value!r} must be a positive number')
    theta, length = rope.pop('rope_theta'), llama.get('max_position_embeddings', 2048)
    head_dim = llama.get('head_dim') or width // heads
    scaling = _scaling(rope, llama.get('original_max_position_embeddings') or length)
    read_scaling(scaling, length, head_dim)  # refuses what is not known
    # Each with what holds in a family that has no argument for it.
    optional: dict[str, tuple[Any, Any]] = {
        'num_kv_heads': (llama.get('num_key_value_heads') or heads, heads),
        'head_dim': (head_dim, width / heads),
        'tie_word_embeddings': (bool(llama.get('tie_word_embeddings', False)), False),
        'rope_scaling': (scaling, None),
    }
    if 'attention_bias' in llama:
        bias = getattr(family, 'attention_bias', False)
        optional['attention_bias'] = (bool(llama['attention_bias']), bias)
    arguments = {ours: llama[theirs] for theirs, ours in _SIZES.items()} | {
        'max_seq_len': length,
        'rope_theta': theta,
        'norm_eps': llama.get('rms_norm_eps', 1e-6),
    }
    taken = inspect.signature(family).parameters
    for key, (value, implied) in optional.items():
        if key not in taken:
            if value != implied:
                raise ValueError(f'{family.__name__} has {key}={implied!r}, not {value!r}')
        elif key in ('num_kv_heads', 'head_dim') or value != taken[key].default:
            arguments[key] = value
    return arguments


def _scaling(rope: dict[str, Any], length: int) -> dict[str, Any] | None:
    """What `rope_scaling` of a model is: the kind and its settings, None for the plain kind."""
    if rope.pop('partial_rotary_factor', 1.0) != 1.0:
        raise ValueError('partial_rotary_factor: only whole heads are rotated here')
    if rope['rope_type'] == 'default':
        return None
    if rope['rope_type'] in _KEPT_LENGTH:
        rope.setdefault('original_max_position_embeddings', length)
    elif rope['rope_type'] == 'dynamic':
        # As transformers has it; said, so that it stays where a longer `max_seq_len` is set.
        rope['original_max_position_embeddings'] = length
    return rope


def _without(dropped: tuple[str, ...], fixed: Config, llama: dict[str, Any]) -> dict[str, Any]:
    """Llama's keys without some, and others with the only value that is done here."""
    config = {key: value for key, value in llama.items() if key not in dropped}
    scaling = dict(config['rope_parameters'])
    # Both spellings: transformers 5 reads `rope_parameters`, servers of before it the others.
    config['rope_theta'] = scaling.pop('rope_theta')
    if scaling['rope_type'] != 'default':
        config['rope_scaling'] = scaling
    return config | dict(fixed)


def _checked(fixed: Config, dropped: tuple[str, ...], config: Config) -> dict[str, Any]:
    """Llama's keys; what the form fixes must be so, and what it does not have is not looked at.

    Raises:
        ValueError: If a key has a value that is not done here.
    """
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise ValueError(f'{key}={config[key]!r}: only {value!r} is done here')
    return {key: value for key, value in config.items() if key not in (*fixed, *dropped)}


def _form(
    name: str,
    architecture: str,
    *,
    fixed: Config | None = None,
    asked: Config | None = None,
    dropped: tuple[str, ...] = (),
    defaults: Config | None = None,
    aliases: tuple[tuple[str, str], ...] = (),
) -> HFForm:
    """A form that differs from Llama's in a few keys.

    Args:
        name: Also its model_type.
        architecture: Its class.
        fixed: Keys of its own with the one value that is done here.
        asked: Further ones, which are not written.
        dropped: Llama's keys that it does not have.
        defaults: What transformers takes where config.json does not say.
        aliases: As in `HFForm`.
    """
    return HFForm(
        name,
        name,
        architecture,
        partial(_without, dropped, fixed or {}),
        partial(_checked, {**(fixed or {}), **(asked or {})}, dropped),
        aliases=aliases,
        defaults=defaults or {},
    )


LLAMA = _form('llama', 'LlamaForCausalLM', defaults={'vocab_size': 32_000, 'attention_bias': False})
INTERNLM = HFForm(
    'internlm', 'internlm', 'InternLMForCausalLM', to_internlm_config, from_internlm_config,
    defaults={'vocab_size': 103_168},
)  # fmt: skip
INTERNLM2 = HFForm(
    'internlm2', 'internlm2', 'InternLM2ForCausalLM', to_internlm2_config, from_internlm2_config,
    internlm2_layout,
    aliases=(('internlm', 'InternLM2ForCausalLM'),),  # folders of early 2024
    defaults={'vocab_size': 103_168},
)  # fmt: skip
INTERNLM3 = _form(
    'internlm3',
    'InternLM3ForCausalLM',
    fixed={'bias': False, 'qkv_bias': False},
    asked={'attention_bias': False, 'mlp_bias': False},  # as transformers spells them
    dropped=('attention_bias', 'mlp_bias'),
    defaults={
        'vocab_size': 128_512,
        'num_key_value_heads': 2,
        'head_dim': 128,
        'max_position_embeddings': 32_768,
        'rms_norm_eps': 1e-5,
    },
    aliases=(('internlm3', 'LlamaForCausalLM'),),  # the class that transformers makes of it
)
MISTRAL = _form(
    'mistral',
    'MistralForCausalLM',
    fixed={'sliding_window': None},
    dropped=('attention_bias', 'mlp_bias'),
    defaults={
        'vocab_size': 32_000,
        'num_key_value_heads': 8,
        'max_position_embeddings': 131_072,
        'sliding_window': 4096,
    },
)
_QWEN = {'vocab_size': 151_936, 'num_key_value_heads': 32, 'max_position_embeddings': 32_768}
QWEN2 = _form(
    'qwen2',
    'Qwen2ForCausalLM',
    fixed={'use_sliding_window': False},
    dropped=('attention_bias', 'mlp_bias', 'head_dim'),
    defaults=_QWEN,
)
QWEN3 = _form(
    'qwen3',
    'Qwen3ForCausalLM',
    fixed={'use_sliding_window': False},
    dropped=('mlp_bias',),
    defaults={**_QWEN, 'head_dim': 128, 'attention_bias': False},
)
