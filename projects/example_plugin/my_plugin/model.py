"""A decoder whose layers attend and transform side by side."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internlm_mm.ops import Documents, apply_rope, make_documents, needs_mask, rope_table
from internlm_mm.ops.attention import sdpa_attention
from internlm_mm.registry import MODELS, OBJECTIVES
from internlm_mm.structures import Batch


class ParallelLayer(nn.Module):
    """`x + out([attention(norm(x)), gelu(up(norm(x)))])`: one norm and one sum for both halves.

    Args:
        hidden_size: Width of the residual stream.
        intermediate_size: Inner width of the feed-forward half.
        num_heads: Attention heads.

    Source: https://arxiv.org/abs/2204.02311, section 2.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(hidden_size, bias=False)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.out = nn.Linear(hidden_size + intermediate_size, hidden_size, bias=False)
        self.attend = sdpa_attention  # the strategy puts the backend of the config here

    def forward(self, x: Tensor, rope: Tensor, documents: Documents | None) -> Tensor:
        """Run the layer. x, result: [rows, seq, hidden]."""
        y = self.norm(x)
        q, k, v = self.qkv(y).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        attended = self.attend(q, k, v, documents).flatten(-2)  # [rows, seq, hidden]
        return x + self.out(torch.cat((attended, F.gelu(self.up(y))), dim=-1))


@MODELS.register_module()
class ParallelDecoder(nn.Module):
    """Decoder of `ParallelLayer`s.

    Args:
        vocab_size: Rows of the embedding table.
        hidden_size: Width of the residual stream.
        intermediate_size: Inner width of the feed-forward halves.
        num_layers: Layers.
        num_heads: Attention heads.
        max_seq_len: Longest sequence, in tokens.
        objective: Config of what training sums; next-token loss if None.

    Raises:
        ValueError: If heads of an even width do not fill `hidden_size`.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_layers: int,
        num_heads: int,
        max_seq_len: int,
        objective: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if hidden_size % (2 * num_heads):
            raise ValueError(f'{num_heads=} heads of an even width do not fill {hidden_size=}')
        self.vocab_size = vocab_size
        self.max_seq_len = max_seq_len
        self.head_dim = hidden_size // num_heads
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleDict(
            {
                str(index): ParallelLayer(hidden_size, intermediate_size, num_heads)
                for index in range(num_layers)
            }
        )
        self.norm = nn.LayerNorm(hidden_size, bias=False)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        self.objective = OBJECTIVES.build(objective or {'type': 'NextToken'})

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sum the objective over a micro-batch; 'loss' is a sum, never a mean."""
        attends = [layer.attend for layer in self.layers.values()]
        documents = make_documents(batch, need_mask=any(map(needs_mask, attends)))
        rope = rope_table(batch.position_ids, self.head_dim, theta=10_000.0)
        x = self.embed_tokens(batch.input_ids)
        for layer in self.layers.values():
            x = layer(x, rope, documents)
        return self.objective(self.norm(x), self.lm_head.weight, batch)

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill one whole parameter: norms with 1, matrices so that layers keep the scale."""
        if tensor.ndim == 1:
            tensor.fill_(1.0)
        else:
            scale = len(self.layers) if name.endswith('out.weight') else 1
            width = tensor.shape[1]
            tensor.normal_(0.0, (width * scale) ** -0.5, generator=generator)
