"""Configuration of InternLM, first generation: transformers' Llama in InternLM's words.

Needs nothing but transformers >= 5.
"""

from typing import Any

from transformers import LlamaConfig

_PLAIN = 'origin'  # InternLM's word for rotary embeddings as they were published


class InternLMConfig(LlamaConfig):
    """A Llama whose config.json says `bias` and `rotary`.

    Args:
        vocab_size: Rows of the embedding table.
        bias: Whether q, k, v and o have biases; Llama's `attention_bias`.
        rotary: `base`, `type` ('origin', 'dynamic' or another kind that transformers knows),
            `scaling_factor` and whatever else the kind needs; Llama's `rope_parameters`.
        kwargs: Llama's other settings, by Llama's names, which InternLM has too.
    """

    model_type = 'internlm'

    def __init__(
        self,
        vocab_size: int = 103_168,
        bias: bool = True,
        rotary: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault('attention_bias', bias)
        kwargs.setdefault('rope_parameters', _to_llama(rotary or {}))
        super().__init__(vocab_size=vocab_size, **kwargs)

    @property
    def bias(self) -> bool:
        return self.attention_bias

    @bias.setter
    def bias(self, value: bool) -> None:
        self.attention_bias = value

    @property
    def rotary(self) -> dict[str, Any]:
        return _from_llama(self.rope_parameters)

    @rotary.setter
    def rotary(self, value: dict[str, Any]) -> None:
        self.rope_parameters = _to_llama(value)

    def to_dict(self) -> dict[str, Any]:
        """What config.json says: InternLM's words instead of Llama's."""
        said = super().to_dict()
        heads = self.num_attention_heads
        implied = {
            'attention_bias': self.bias,
            'rope_parameters': self.rope_parameters,
            'num_key_value_heads': heads,
            'head_dim': self.hidden_size // heads,
            'mlp_bias': False,
            'attention_dropout': 0.0,
            'pretraining_tp': 1,
        }
        for key, value in implied.items():
            if said.get(key) == value:
                del said[key]
        return said | {'bias': self.bias, 'rotary': self.rotary}


def _to_llama(rotary: dict[str, Any]) -> dict[str, Any]:
    """transformers' rope_parameters."""
    rest = dict(rotary)
    kind = rest.pop('type', _PLAIN)
    rope = {
        'rope_type': 'default' if kind == _PLAIN else kind,
        'rope_theta': rest.pop('base', 10_000.0),
    }
    factor = rest.pop('scaling_factor', 1.0 if kind == 'dynamic' else None)
    return rope | ({} if factor is None else {'factor': factor}) | rest


def _from_llama(rope_parameters: Any) -> dict[str, Any]:
    """InternLM's rotary."""
    rest = dict(rope_parameters)
    kind = rest.pop('rope_type')
    rotary = {'base': rest.pop('rope_theta'), 'type': _PLAIN if kind == 'default' else kind}
    if 'factor' in rest:
        rotary['scaling_factor'] = rest.pop('factor')
    return rotary | rest
