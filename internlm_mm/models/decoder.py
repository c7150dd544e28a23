"""The decoder that every family shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from internlm_mm.models.init import NormalInit
from internlm_mm.models.layers import RMSNorm, TiedHead
from internlm_mm.models.lora import adapters_off
from internlm_mm.models.objectives import NextToken
from internlm_mm.ops import Documents, KVCache, LayerCache, make_documents, needs_mask, rope_table
from internlm_mm.ops.rope import read_scaling
from internlm_mm.registry import OBJECTIVES
from internlm_mm.structures import Batch


class DecoderLayer(nn.Module):
    """Pre-norm residual layer: `x + self_attn(norm(x))`, then `x + mlp(norm(x))`.

    Args:
        self_attn: The attention layer, built.
        mlp: The feed-forward layer, built.
        hidden_size: Width of the residual stream.
        norm_eps: Added to the mean square in both norms.
    """

    def __init__(
        self, self_attn: nn.Module, mlp: nn.Module, hidden_size: int, norm_eps: float
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(hidden_size, norm_eps)
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(hidden_size, norm_eps)
        self.mlp = mlp

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        documents: Documents | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Run the layer. x, result: [rows, seq, hidden]; rope: [2, rows, seq, head_dim // 2]."""
        x = x + self.self_attn(self.input_layernorm(x), rope, documents, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Decoder-only language model: the part that every family shares.

    It is single-device code. Parallelism, recomputation, precision and kernels are applied from
    outside, to the names below and to `layers.*.self_attn.attend`. `embed_tokens`, or `norm` and
    `lm_head` together, may be None: such a part of a model begins or ends inside the layers.

    Args:
        make_layer: Builds one layer; called once the sizes are checked.
        num_layers: How many layers.
        vocab_size: Rows of the embedding table, padding rows included.
        hidden_size: Width of the residual stream.
        intermediate_size: Inner width of the feed-forward layers.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.
        head_dim: Width of one head.
        max_seq_len: Longest row, in tokens.
        rope_theta: Base of the rotary wavelengths.
        rope_scaling: How they are changed for longer sequences, in transformers' words: `rope_type`
            and what belongs to it, as `internlm_mm.ops.rope` lists; None for not at all.
        norm_eps: Added to the mean square in every norm.
        tie_word_embeddings: Whether the head is the embedding table, turned round.
        objective: What training sums, as a module or its config; next-token loss if None.

    Raises:
        ValueError: If a size is not positive, or `rope_scaling` says what is not known.
    """

    init: ClassVar[NormalInit]
    tensor_plan: dict[str, str] = {  # noqa: RUF012  never changed in place
        # Module names -> how tensor parallelism splits them (docs/en/parallel.md).
        'embed_tokens': 'vocabulary',
        'layers.*.input_layernorm': 'sequence',
        'layers.*.self_attn': 'gather',
        'layers.*.self_attn.[qkv]_proj': 'column',
        'layers.*.self_attn.o_proj': 'row',
        'layers.*.post_attention_layernorm': 'sequence',
        'layers.*.mlp': 'gather',
        'layers.*.mlp.gate_proj': 'column',
        'layers.*.mlp.up_proj': 'column',
        'layers.*.mlp.down_proj': 'row',
        'norm': 'gather_output',
        'lm_head': 'head',
    }

    def __init__(
        self,
        make_layer: Callable[[], DecoderLayer],
        *,
        num_layers: int,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        max_seq_len: int,
        rope_theta: float,
        rope_scaling: Mapping[str, Any] | None = None,
        norm_eps: float,
        tie_word_embeddings: bool = False,
        objective: dict[str, Any] | nn.Module | None,
    ) -> None:
        super().__init__()
        check_sizes(
            num_layers=num_layers,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_seq_len=max_seq_len,
        )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.max_seq_len = max_seq_len
        self.rope_theta = rope_theta
        self.rope_scaling = None if rope_scaling is None else dict(rope_scaling)
        self._scaling = read_scaling(rope_scaling, max_seq_len, head_dim)
        self.norm_eps = norm_eps
        self.embed_tokens: nn.Embedding | None = nn.Embedding(vocab_size, hidden_size)
        # A dict, so that a layer keeps its name when a pipeline stage drops the others.
        self.layers = nn.ModuleDict({str(i): make_layer() for i in range(num_layers)})
        self.norm: RMSNorm | None = RMSNorm(hidden_size, norm_eps)
        self.objective: nn.Module = (
            objective
            if isinstance(objective, nn.Module)
            else OBJECTIVES.build(objective or {'type': NextToken})
        )
        has_head = not getattr(self.objective, 'replaces_head', False)
        self.tie_word_embeddings = tie_word_embeddings and has_head
        self.lm_head: nn.Linear | TiedHead | None = None
        if not has_head:  # a reward, whose objective has its own
            self.objective.attach(hidden_size)  # type: ignore[operator]
        elif tie_word_embeddings:
            self.lm_head = TiedHead(self.embed_tokens)
        else:
            self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        if not isinstance(self.lm_head, nn.Linear):
            self.tensor_plan = {k: v for k, v in self.tensor_plan.items() if k != 'lm_head'}

    def forward(self, batch: Batch, hidden: Tensor | None = None) -> dict[str, Tensor] | Tensor:
        """Sum the objective over a micro-batch.

        Args:
            batch: The micro-batch.
            hidden: Output of the layers before, [rows, seq, hidden], where this is a later part of
                a model.

        Returns:
            'loss', float32 [], a sum and not a mean; and whatever else the objective sums. Of a
            part without a head the output of its last layer, [rows, seq, hidden].
        """
        documents = make_documents(batch, need_mask=any(map(_needs_mask, self.layers.values())))
        lengths = batch.document_lengths() if self._asks_for_lengths() else None
        if batch.references is None and getattr(self.objective, 'reads_adapters_off', False):
            batch = self._with_references(batch, documents, lengths)
        hidden = self.hidden_states(
            batch.input_ids, batch.position_ids, documents, previous=hidden, lengths=lengths
        )
        if self.lm_head is not None:
            return self.objective(hidden, self.lm_head.weight, batch)
        if getattr(self.objective, 'replaces_head', False):
            return self.objective(hidden, None, batch)
        return hidden

    @torch.no_grad()
    def _with_references(
        self, batch: Batch, documents: Documents | None, lengths: Tensor | None
    ) -> Batch:
        """The batch with what the model says of its answers without its adapters."""
        assert self.lm_head is not None
        with adapters_off(self):
            hidden = self.hidden_states(
                batch.input_ids, batch.position_ids, documents, lengths=lengths
            )
        objective: Any = self.objective
        log_probs, _ = objective.log_probs(hidden, self.lm_head.weight, batch)
        return replace(batch, references=log_probs)

    def hidden_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        documents: Documents | None = None,
        cache: KVCache | None = None,
        previous: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """What the head reads.

        Args:
            input_ids: [rows, seq].
            position_ids: Position of each token in its document, [rows, seq].
            documents: Boundaries inside the rows; None when each row is one document.
            cache: Keys and values of earlier tokens, when generating.
            previous: Output of the layers before, where there is no embedding here.
            lengths: Tokens in the document of each token, [rows, seq] or [rows, 1], for rotary
                embeddings that follow from it. By default what `documents` says; a row that is one
                document is as long as its last position says.

        Returns:
            Normalised output of the last layer, [rows, seq, hidden]; as it is without `norm`.

        Raises:
            ValueError: If a row is longer than the model's longest sequence.
        """
        seq = input_ids.shape[1]
        if seq > self.max_seq_len:
            raise ValueError(f'rows of {seq} tokens exceed max_seq_len={self.max_seq_len}')
        if lengths is None and self._asks_for_lengths():
            longest = position_ids.amax(1, keepdim=True) + 1
            lengths = longest if documents is None else documents.lengths()
        rope = rope_table(position_ids, self.head_dim, self.rope_theta, self._scaling, lengths)
        caches = {} if cache is None else cache.extend(position_ids)
        x = previous if self.embed_tokens is None else self.embed_tokens(input_ids)
        assert x is not None, 'a part of a model without embedding needs the layers before'
        for name, layer in self.layers.items():
            x = layer(x, rope, documents, caches.get(name))
        return x if self.norm is None else self.norm(x)

    def _asks_for_lengths(self) -> bool:
        return self._scaling is not None and self._scaling.depends_on_length

    def logits(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Score every next token, for inference; each row is one document.

        Args:
            input_ids: [rows, seq].
            position_ids: [rows, seq]; if None they follow on from what the cache holds.
            cache: From `make_cache`; extended in place.

        Returns:
            [rows, seq, vocab].
        """
        if position_ids is None:
            start = 0 if cache is None else cache.length
            position_ids = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
            position_ids = position_ids.expand_as(input_ids)
        assert self.lm_head is not None
        return self.lm_head(self.hidden_states(input_ids, position_ids, None, cache))

    def make_cache(self, rows: int, capacity: int) -> KVCache:
        """An empty KV cache for `rows` sequences of up to `capacity` tokens."""
        assert self.embed_tokens is not None
        weight = self.embed_tokens.weight
        return KVCache(
            list(self.layers),
            rows,
            capacity,
            self.num_kv_heads,
            self.head_dim,
            weight.dtype,
            weight.device,
        )

    @torch.no_grad()
    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill one whole parameter in place.

        Called per name with full tensors on the CPU, so that every layout of devices starts with
        the same weights.

        Args:
            name: As in `named_parameters()`.
            tensor: Of the parameter's full shape.
            generator: The only source of randomness.
        """
        self.init.fill(name, tensor, generator)


def _needs_mask(layer: Any) -> bool:
    return needs_mask(layer.self_attn.attend)


def check_sizes(**sizes: int) -> None:
    """Raise ValueError, naming the key, unless every size is a positive int."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size <= 0:
            raise ValueError(f'{name}={size!r} must be a positive integer')
