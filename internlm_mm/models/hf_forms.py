"""The forms that Hugging Face has for our families: config.json and the names of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from internlm_mm.utils.weight_layout import WeightLayout

Config = Mapping[str, Any]

LLAMA_NAMES = {
    'embed_tokens.': 'model.embed_tokens.',
    'layers.': 'model.layers.',
    'norm.': 'model.norm.',
    'lm_head.': 'lm_head.',
}
COMPUTED = ('rotary_emb.inv_freq',)  # stored by old exporters; computed here


def llama_layout(num_heads: int, num_kv_heads: int) -> WeightLayout:
    """Llama's names, which most families share; nothing is packed, so heads do not matter."""
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
    """

    name: str
    model_type: str
    architecture: str
    from_llama: Callable[[dict[str, Any]], dict[str, Any]]
    to_llama: Callable[[Config], dict[str, Any]]
    layout: Callable[[int, int], WeightLayout] = llama_layout

    def config(self, llama: dict[str, Any]) -> dict[str, Any]:
        """The content of config.json, from Llama's."""
        named = {'architectures': [self.architecture], 'model_type': self.model_type}
        return named | self.from_llama(llama)

    def describes(self, config: Config) -> bool:
        """Whether `config` is of this form."""
        architectures = config.get('architectures') or [self.architecture]
        return config.get('model_type') == self.model_type and self.architecture in architectures


def _without(dropped: tuple[str, ...], fixed: Config, llama: dict[str, Any]) -> dict[str, Any]:
    """Llama's keys without some, and others with the only value that is done here."""
    return {key: value for key, value in llama.items() if key not in dropped} | dict(fixed)


def _checked(fixed: Config, implied: Config, config: Config) -> dict[str, Any]:
    """Llama's keys; what the form fixes must be so, and what it implies is added.

    Raises:
        ValueError: If a key has a value that is not done here.
    """
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise ValueError(f'{key}={config[key]!r}: only {value!r} is done here')
    return {key: value for key, value in config.items() if key not in fixed} | dict(implied)


def _form(
    name: str,
    architecture: str,
    *,
    fixed: Config | None = None,
    implied: Config | None = None,
    dropped: tuple[str, ...] = (),
) -> HFForm:
    """A form that differs from Llama's in a few keys.

    Args:
        name: Also its model_type.
        architecture: Its class.
        fixed: Keys of its own with the one value that is done here.
        implied: Llama's keys that it does not have, and what holds instead.
        dropped: Llama's keys that it does not have.
    """
    away = tuple(dropped) + tuple(implied or ())
    return HFForm(
        name,
        name,
        architecture,
        partial(_without, away, fixed or {}),
        partial(_checked, fixed or {}, implied or {}),
    )


LLAMA = _form('llama', 'LlamaForCausalLM')
MISTRAL = _form('mistral', 'MistralForCausalLM', dropped=('attention_bias', 'mlp_bias'))
INTERNLM3 = _form(
    'internlm3',
    'InternLM3ForCausalLM',
    fixed={'bias': False, 'qkv_bias': False},
    dropped=('attention_bias', 'mlp_bias'),
)
_FULL = {'use_sliding_window': False}
QWEN2 = _form(
    'qwen2',
    'Qwen2ForCausalLM',
    fixed=_FULL,
    implied={'attention_bias': True},
    dropped=('mlp_bias', 'head_dim'),
)
QWEN3 = _form('qwen3', 'Qwen3ForCausalLM', fixed=_FULL, dropped=('mlp_bias',))
