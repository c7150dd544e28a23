"""The numbers that decide how much memory a run takes, and the shapes that follow from them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapters:
    """Low-rank changes of linear layers, beside which all of a decoder is frozen.

    Attributes:
        rank: Of the changes.
        layers: Names of the linear layers that have one, as 'layers.0.self_attn.q_proj'.
        lengths: Whether the length of each row is learnt apart (DoRA).
        dropout: Whether inputs of the changes are dropped in training.
        four_bit: Whether the frozen weights under adapters are held in 4 bits.
    """

    rank: int
    layers: frozenset[str]
    lengths: bool = False
    dropout: bool = False
    four_bit: bool = False

    @property
    def first(self) -> int:
        """Number of the first decoder layer that has one: before it nothing has a gradient."""
        return min(int(name.split('.')[1]) for name in self.layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """Sizes of a decoder.

    Attributes:
        num_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        intermediate_size: Inner width of the feed-forward layers, which have three matrices.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.
        head_dim: Width of one head.
        vocab_size: Rows of the embedding table and of the head.
        attention_bias: Whether q, k and v have biases.
        output_bias: Whether o has one; as `attention_bias` if None.
        qk_norm: Whether queries and keys are normalised, by two norms as wide as a head.
        tie_word_embeddings: Whether the head is the embedding table.
        has_head: Whether there is a head over the vocabulary; a reward has a vector in its place.
        compares_pairs: Whether the loss is one of pairs of answers, known in backward alone.
        adapters: What is trained, if that is not all.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    attention_bias: bool
    output_bias: bool | None = None
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    has_head: bool = True
    compares_pairs: bool = False
    adapters: Adapters | None = None

    @property
    def trains_head(self) -> bool:
        """Whether the loss makes a gradient of the head's weight."""
        return self.has_head and self.adapters is None

    def adapted(self, layer: int) -> set[str]:
        """Linear layers of a decoder layer that have adapters, as 'q_proj'."""
        if self.adapters is None:
            return set()
        start = f'layers.{layer}.'
        return {name.rpartition('.')[2] for name in self.adapters.layers if name.startswith(start)}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSizes:
    """What of a run, besides the model, decides about memory.

    Attributes:
        seq_len: Tokens in a row.
        micro_batch_size: Rows of one forward on one data rank.
        micro_batches: Forwards of one data rank in a step.
        stages: Numbers of the layers of each pipeline stage, in the stages' order.
        stages_of_rank: Stages that each rank of the pipeline axis holds.
        data_replicate: Copies of the sharded model.
        data_shard: Ranks over which parameters are sharded, with those of `context`.
        context: Ranks that share the tokens of a row.
        tensor: Ranks that share every matrix.
        param_bytes: Of one number in what layers compute in.
        reduce_bytes: Of one number in what gradients are summed in.
        in_8_bits: Names of the weights that are gathered as numbers of one byte.
        sharded: Whether FSDP2 holds the parameters; else computing uses the masters themselves.
        reshard: 'never', 'step' or 'layer': how long gathered parameters are kept.
        recompute: Share of a rank's layers, the first ones, that keep only their inputs.
        selective: Whether these also keep what matrix products and attention gave.
        compiled: Whether layers are compiled.
        rounded: Whether their matrix products, also those of backward, round what they read.
        schedule: Name of the pipeline's schedule.
        mask: Bytes of the attention mask that each layer keeps, per pair of tokens of a row; 0
            where kernels need none.
        context_kernel: Whether context parallelism uses a kernel that works chunk by chunk.
        chunk_tokens: Tokens whose logits are held at a time.
        loss_in_place: Whether the gradient of logits takes their place, as on a GPU.
        moments: Numbers that the optimizer keeps for each parameter.
        states: What it keeps for the parameters of these names, where it is something else.
        optimizer_copies: Further numbers for each parameter while the optimizer steps; 0 if fused.
        offload: Whether masters, gradients and moments are in host memory.
    """

    seq_len: int
    micro_batch_size: int
    micro_batches: int
    stages: tuple[tuple[int, ...], ...]
    stages_of_rank: tuple[tuple[int, ...], ...] = ((0,),)
    data_replicate: int = 1
    data_shard: int = 1
    context: int = 1
    tensor: int = 1
    param_bytes: int = 4
    reduce_bytes: int = 4
    in_8_bits: frozenset[str] = frozenset()
    sharded: bool = True
    reshard: str = 'step'
    recompute: float = 0.0
    selective: bool = False
    compiled: bool = False
    rounded: bool = False
    schedule: str = '1f1b'
    mask: int = 0
    context_kernel: bool = False
    chunk_tokens: int = 1024
    loss_in_place: bool = False
    moments: int = 2
    states: Mapping[str, 'StateSize'] = field(default_factory=dict)
    optimizer_copies: int = 0
    offload: bool = False

    @property
    def shards(self) -> int:
        """Ranks that a parameter is spread over, besides tensor parallelism."""
        return self.data_shard * self.context

    @property
    def tokens(self) -> int:
        """Tokens of one forward on one rank, before tensor parallelism shares some of them out."""
        return self.micro_batch_size * self.seq_len // self.context

    @property
    def master_bytes(self) -> int:
        """Of one number in the optimizer's copy: fp32, or fp64 where layers compute in that."""
        return max(4, self.param_bytes)

    @property
    def frozen_whole(self) -> bool:
        """Whether ranks hold frozen weights whole, see `internlm_mm.parallel.adapters`."""
        return not self.offload and (self.shards == 1 or self.reshard == 'never')


class StateSize(NamedTuple):
    """What an optimizer keeps for one parameter, in bytes.

    Attributes:
        each: For each of its numbers.
        fixed: Besides, as a step count.
    """

    each: float
    fixed: int


class ParameterShape(NamedTuple):
    """One parameter.

    Attributes:
        name: As in the model.
        shape: Whole.
        split: Dimension that tensor parallelism cuts, or None.
        trained: Whether it has a gradient.
        in_4_bits: Whether it is held in 4 bits, with a scale of four bytes for 64 numbers.
    """

    name: str
    shape: tuple[int, ...]
    split: int | None
    trained: bool = True
    in_4_bits: bool = False

    def unsharded(self, tensor: int) -> int:
        """Numbers that a rank computes with."""
        return prod(self._cut(tensor))

    def sharded(self, tensor: int, shards: int, index: int | None = None) -> int:
        """Numbers that a rank keeps.

        Args:
            tensor: Ranks of the tensor axis.
            shards: Ranks that the rest is spread over, along the first dimension.
            index: Which of them; None for the size of the memory, which is the largest rank's.
        """
        rows, *rest = self._cut(tensor)
        share = -(-rows // shards)
        if index is not None:
            share = max(0, min(rows - index * share, share))
        return share * prod(rest)

    def _cut(self, tensor: int) -> list[int]:
        shape = list(self.shape)
        if self.split is not None:
            shape[self.split] //= tensor
        return shape


def layer_parameters(sizes: ModelSizes, layer: int) -> list[ParameterShape]:
    """The parameters of one decoder layer; matrices are [out, in]."""
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    wide, narrow = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    linear = {
        'self_attn.q_proj': (wide, hidden, 0),
        'self_attn.k_proj': (narrow, hidden, 0),
        'self_attn.v_proj': (narrow, hidden, 0),
        'self_attn.o_proj': (hidden, wide, 1),
        'mlp.gate_proj': (inner, hidden, 0),
        'mlp.up_proj': (inner, hidden, 0),
        'mlp.down_proj': (hidden, inner, 1),
    }
    output_bias = sizes.attention_bias if sizes.output_bias is None else sizes.output_bias
    biases = [f'self_attn.{x}_proj' for x in 'qkv'] if sizes.attention_bias else []
    biases += ['self_attn.o_proj'] if output_bias else []
    adapters, trained = sizes.adapters, sizes.adapters is None
    found = []
    for name, (out, into, split) in linear.items():
        whole = f'layers.{layer}.{name}'
        is_adapted = adapters is not None and whole in adapters.layers
        in_4_bits = adapters is not None and adapters.four_bit and is_adapted
        found.append(ParameterShape(f'{whole}.weight', (out, into), split, trained, in_4_bits))
        # The bias of a matrix that is cut by its input is added once, after the sum.
        rows_split = 0 if split == 0 else None
        if name in biases:
            found.append(ParameterShape(f'{whole}.bias', (out,), rows_split, trained))
        if adapters is not None and is_adapted:
            rank, down_split = adapters.rank, 1 if split == 1 else None
            found.append(ParameterShape(f'{whole}.lora_A.weight', (rank, into), down_split))
            found.append(ParameterShape(f'{whole}.lora_B.weight', (out, rank), rows_split))
            if adapters.lengths:
                lengths = f'{whole}.lora_magnitude_vector.weight'
                found.append(ParameterShape(lengths, (out,), rows_split))
    norms = {'input_layernorm': hidden, 'post_attention_layernorm': hidden}
    if sizes.qk_norm:
        norms |= {'self_attn.q_norm': sizes.head_dim, 'self_attn.k_norm': sizes.head_dim}
    for norm, width in norms.items():
        found.append(ParameterShape(f'layers.{layer}.{norm}.weight', (width,), None, trained))
    return found


def outer_parameters(sizes: ModelSizes, first: bool, last: bool) -> list[ParameterShape]:
    """What is outside the layers: the embedding in the first stage, norm and head in the last."""
    table, trained = (sizes.vocab_size, sizes.hidden_size), sizes.adapters is None
    found = [ParameterShape('embed_tokens.weight', table, 0, trained)] if first else []
    if last:
        found.append(ParameterShape('norm.weight', (sizes.hidden_size,), None, trained))
        if not sizes.has_head:
            found.append(ParameterShape('objective.score.weight', (1, sizes.hidden_size), None))
        elif not sizes.tie_word_embeddings:
            found.append(ParameterShape('lm_head.weight', table, 0, trained))
    return found
