"""Families that Hugging Face loads as a plain `LlamaForCausalLM`, without remote code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from internlm_mm.models.decoder import Decoder


class LlamaFormat(Decoder):
    """A decoder whose weights and configuration map one to one onto Hugging Face's Llama.

    `hf_names` is the whole of the weight mapping: beginnings of our names, and of theirs.
    `internlm_mm.checkpoint.huggingface` reads it and never imports a model.
    """

    hf_architecture: ClassVar[str] = 'LlamaForCausalLM'
    hf_names: ClassVar[dict[str, str]] = {
        'embed_tokens.': 'model.embed_tokens.',
        'layers.': 'model.layers.',
        'norm.': 'model.norm.',
        'lm_head.': 'lm_head.',
    }
    attention_bias: ClassVar[bool]

    def hf_config(self) -> dict[str, Any]:
        """The content of config.json, but for token ids and dtype, which the exporter adds."""
        return {
            'architectures': [self.hf_architecture],
            'model_type': 'llama',
            'vocab_size': self.vocab_size,
            'hidden_size': self.hidden_size,
            'intermediate_size': self.intermediate_size,
            'num_hidden_layers': len(self.layers),
            'num_attention_heads': self.num_heads,
            'num_key_value_heads': self.num_kv_heads,
            'head_dim': self.head_dim,
            'max_position_embeddings': self.max_seq_len,
            'rms_norm_eps': self.norm_eps,
            'hidden_act': 'silu',
            'attention_bias': self.attention_bias,
            'mlp_bias': False,
            'tie_word_embeddings': False,
            'attention_dropout': 0.0,
            'initializer_range': self.init.projection,
            # Both spellings: transformers 5 reads the second, servers of before it the first.
            'rope_theta': self.rope_theta,
            'rope_parameters': {'rope_type': 'default', 'rope_theta': self.rope_theta},
            'use_cache': True,
        }

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of this class's constructor that give the model of a config.json.

        Args:
            config: The content of config.json.

        Raises:
            ValueError: If the config asks for something that this family does not do.
        """
        rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
        asked = {
            'architectures': list(config.get('architectures') or [cls.hf_architecture]),
            'attention_bias': bool(config.get('attention_bias', False)),
            'mlp_bias': bool(config.get('mlp_bias', False)),
            'tie_word_embeddings': bool(config.get('tie_word_embeddings', False)),
            'hidden_act': config.get('hidden_act', 'silu'),
            'rope_type': rope.get('rope_type', rope.get('type', 'default')),
        }
        done = {
            'architectures': [cls.hf_architecture],
            'attention_bias': cls.attention_bias,
            'mlp_bias': False,
            'tie_word_embeddings': False,
            'hidden_act': 'silu',
            'rope_type': 'default',
        }
        for key, value in asked.items():
            if value != done[key]:
                raise ValueError(f'{cls.__name__} has {key}={done[key]!r}, not {value!r}')
        heads = config['num_attention_heads']
        return {
            'vocab_size': config['vocab_size'],
            'hidden_size': config['hidden_size'],
            'intermediate_size': config['intermediate_size'],
            'num_layers': config['num_hidden_layers'],
            'num_heads': heads,
            'num_kv_heads': config.get('num_key_value_heads') or heads,
            'head_dim': config.get('head_dim') or config['hidden_size'] // heads,
            'max_seq_len': config.get('max_position_embeddings', 2048),
            'rope_theta': rope.get('rope_theta', config.get('rope_theta', 10_000.0)),
            'norm_eps': config.get('rms_norm_eps', 1e-6),
        }
