"""Configuration of InternLM2: transformers' Llama in InternLM2's words.

Needs nothing but transformers >= 5.
"""

from typing import Any, ClassVar

from transformers import LlamaConfig


class InternLM2Config(LlamaConfig):
    """A Llama whose config.json says `bias`, `rope_theta` and `rope_scaling`.

    Args:
        vocab_size: Rows of the embedding table.
        bias: Whether wqkv and wo have biases; Llama's `attention_bias`.
        rope_theta: Base of the rotary wavelengths.
        rope_scaling: `type`, `factor` and whatever else the kind needs, as transformers names
            kinds; None for rotary embeddings as they were published.
        kwargs: Llama's other settings, by Llama's names, which InternLM2 has too.
    """

    model_type = 'internlm2'
    base_model_tp_plan: ClassVar[dict[str, Any]] = {
        'layers.*.attention.wqkv': 'colwise',
        'layers.*.attention.wo': 'rowwise',
        'layers.*.feed_forward.w1': 'colwise',
        'layers.*.feed_forward.w3': 'colwise',
        'layers.*.feed_forward.w2': 'rowwise',
    }
    base_model_pp_plan: ClassVar[dict[str, Any]] = {
        'tok_embeddings': (['input_ids'], ['inputs_embeds']),
        'layers': (['hidden_states', 'attention_mask'], ['hidden_states']),
        'norm': (['hidden_states'], ['hidden_states']),
    }
    base_model_fsdp_plan: ClassVar[dict[str, str]] = {
        'tok_embeddings': 'free_full_weight',
        'layers.*': 'free_full_weight',
        'norm': 'keep_full_weight',
    }

    def __init__(
        self,
        vocab_size: int = 103_168,
        bias: bool = True,
        rope_theta: float = 10_000.0,
        rope_scaling: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        rope = dict(rope_scaling or {})
        kind = rope.pop('type', None) or rope.pop('rope_type', 'default')
        rope = {'rope_type': kind, 'rope_theta': rope_theta} | rope
        kwargs.setdefault('attention_bias', bias)
        kwargs.setdefault('rope_parameters', rope)
        super().__init__(vocab_size=vocab_size, **kwargs)

    @property
    def bias(self) -> bool:
        return self.attention_bias

    @bias.setter
    def bias(self, value: bool) -> None:
        self.attention_bias = value

    def to_dict(self) -> dict[str, Any]:
        """What config.json says: InternLM2's words instead of Llama's."""
        said = super().to_dict()
        implied = {
            'attention_bias': self.bias,
            'head_dim': self.hidden_size // self.num_attention_heads,
            'mlp_bias': False,
            'attention_dropout': 0.0,
            'pretraining_tp': 1,
        }
        for key, value in implied.items():
            if said.get(key) == value:
                del said[key]
        rest = said.pop('rope_parameters')
        theta, kind = rest.pop('rope_theta'), rest.pop('rope_type')
        scaling = None if kind == 'default' else {'type': kind, **rest}
        return said | {'bias': self.bias, 'rope_theta': theta, 'rope_scaling': scaling}
