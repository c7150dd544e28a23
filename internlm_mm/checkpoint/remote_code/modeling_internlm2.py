"""InternLM2: transformers' Llama with q, k and v in one projection, InternLM2's names, and `chat`.

Needs nothing but torch and transformers >= 5.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .chat_internlm import Chat
from .configuration_internlm2 import InternLM2Config


class InternLM2Attention(nn.Module):
    """Grouped-query attention.

    The rows of `wqkv`, for every key head in turn: the query heads that share it, the key, the
    value. Each head's channel i is rotated together with channel i + head_dim / 2.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        width = config.num_attention_heads * self.head_dim
        packed = width + 2 * config.num_key_value_heads * self.head_dim
        self.wqkv = nn.Linear(config.hidden_size, packed, bias=config.attention_bias)
        self.wo = nn.Linear(width, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = hidden_states.shape[:-1]
        groups = self.num_key_value_groups
        # [batch, seq, key heads, group + 2, head_dim]
        packed = self.wqkv(hidden_states).view(*shape, -1, groups + 2, self.head_dim)
        query, key, value = packed.split([groups, 1, 1], dim=-2)
        # [batch, heads, seq, head_dim]
        query, key, value = (x.flatten(2, 3).transpose(1, 2) for x in (query, key, value))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.wo(output.reshape(*shape, -1).contiguous()), weights


class InternLM2MLP(nn.Module):
    def __init__(self, config: InternLM2Config) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


class InternLM2DecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: InternLM2Config, layer_idx: int) -> None:
        super().__init__()
        self.attention = InternLM2Attention(config, layer_idx)
        self.feed_forward = InternLM2MLP(config)
        self.attention_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.ffn_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.attention(self.attention_norm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.feed_forward(self.ffn_norm(hidden_states))


class InternLM2PreTrainedModel(LlamaPreTrainedModel):
    config_class = InternLM2Config
    _no_split_modules = ['InternLM2DecoderLayer']
    _can_record_outputs = {
        'hidden_states': InternLM2DecoderLayer,
        'attentions': InternLM2Attention,
    }
    _input_embed_layer = 'tok_embeddings'


class InternLM2Model(InternLM2PreTrainedModel, LlamaModel):
    """Llama's own forward, over layers with InternLM2's names."""

    def __init__(self, config: InternLM2Config) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.tok_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, config.pad_token_id
        )
        self.layers = nn.ModuleList(
            InternLM2DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Llama's."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError('give either input_ids or inputs_embeds')
        if inputs_embeds is None:
            inputs_embeds = self.tok_embeddings(input_ids)
        return super().forward(attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)


def _renamed(plan: dict[str, Any]) -> dict[str, Any]:
    """A table of Llama's about its output layer, for ours."""
    return {name.replace('lm_head', 'output'): value for name, value in plan.items()}


class InternLM2ForCausalLM(Chat, InternLM2PreTrainedModel, LlamaForCausalLM):
    r"""The model with its output layer; `chat` and `stream_chat` hold a dialogue.

    Every turn is `<|im_start|>ROLE\nTEXT<|im_end|>\n`, with the roles system, user, assistant.
    """

    _tied_weights_keys = {'output.weight': 'model.tok_embeddings.weight'}
    _tp_plan = _renamed(LlamaForCausalLM._tp_plan)
    _pp_plan = _renamed(LlamaForCausalLM._pp_plan)
    _fsdp_plan = _renamed(getattr(LlamaForCausalLM, '_fsdp_plan', None) or {})

    marks = (
        '<|im_start|>',
        '<|im_end|>',
        '<|action_start|>',
        '<|action_end|>',
        '<|interpreter|>',
        '<|plugin|>',
    )
    stop_marks = ('<|im_end|>',)
    default_meta_instruction = (
        'You are InternLM (书生·浦语), an AI assistant made by Shanghai AI Laboratory '
        '(上海人工智能实验室). You are helpful, honest and harmless, and you answer in the '
        "user's language, be it English, 中文 or another."
    )

    def __init__(self, config: InternLM2Config) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = InternLM2Model(config)
        self.vocab_size = config.vocab_size
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def lm_head(self) -> nn.Linear:
        """What Llama's forward calls the output layer."""
        return self.output

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.output = new_embeddings

    def prompt_pieces(
        self, query: str, history: Sequence[tuple[str, str]], meta_instruction: str
    ) -> list[tuple[str, str, str]]:
        turns = [('system', meta_instruction)] if meta_instruction else []
        for past_query, past_response in history:
            turns += [('user', past_query), ('assistant', past_response)]
        pieces = [
            (f'<|im_start|>{role}\n', text, '<|im_end|>\n')
            for role, text in [*turns, ('user', query)]
        ]
        return [*pieces, ('<|im_start|>assistant\n', '', '')]


class InternLM2ForSequenceClassification(InternLM2PreTrainedModel, LlamaForSequenceClassification):
    def __init__(self, config: Any) -> None:
        # Llama's own asks the auto classes for the model below, and those do not know this one.
        LlamaPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = InternLM2Model(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
