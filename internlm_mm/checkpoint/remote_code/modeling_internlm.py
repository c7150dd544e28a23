"""InternLM, first generation: transformers' Llama with biases in its attention, and `chat`.

Needs nothing but torch and transformers >= 5. Weights have Llama's names.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from .chat_internlm import Chat
from .configuration_internlm import InternLMConfig


class InternLMModel(LlamaModel):
    config_class = InternLMConfig


class InternLMForCausalLM(Chat, LlamaForCausalLM):
    r"""The model with its output layer; `chat` and `stream_chat` hold a dialogue.

    A dialogue is `<s><|User|>:QUERY<eoh>\n<|Bot|>:RESPONSE<eoa>\n`, the pair repeated for each
    turn; a system prompt, where there is one, comes first as `<|System|>:PROMPT\n`.
    """

    config_class = InternLMConfig
    marks = ('<eoh>', '<eoa>')
    stop_marks = ('<eoa>',)

    def prompt_pieces(
        self, query: str, history: Sequence[tuple[str, str]], meta_instruction: str
    ) -> list[tuple[str, str, str]]:
        pieces = [('<|System|>:', meta_instruction, '\n')] if meta_instruction else []
        for past_query, past_response in history:
            pieces.append(('<|User|>:', past_query, '<eoh>\n'))
            pieces.append(('<|Bot|>:', past_response, '<eoa>\n'))
        return [*pieces, ('<|User|>:', query, '<eoh>\n'), ('<|Bot|>:', '', '')]


class InternLMForSequenceClassification(LlamaForSequenceClassification):
    config_class = InternLMConfig

    def __init__(self, config: Any) -> None:
        # Llama's own asks the auto classes for the model below, and those do not know this one.
        LlamaPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = InternLMModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
