"""What forward leaves for backward, in bytes, counted tensor by tensor.

The counts follow the model's code: which tensors autograd keeps, each storage once.
"""

from collections.abc import Sequence

from internlm_mm.planner.sizes import Adapters, ModelSizes, RunSizes


def layer_bytes(sizes: ModelSizes, run: RunSizes, layer: int = 0) -> int:
    """Kept by one layer that is not recomputed, for one micro-batch.

    Args:
        sizes: Of the model.
        run: Of the run.
        layer: Its number; they differ by their adapters alone.
    """
    if sizes.adapters is not None:
        return _adapted_layer_bytes(sizes, sizes.adapters, run, layer)
    p, tokens = run.param_bytes, run.tokens
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    own = tokens // run.tensor  # sequence parallelism: norms see a share of the tokens
    # Where backward rounds what norms and gates gave, with other elementwise work, the compiler
    # computes that again by itself.
    is_made_again = run.compiled and run.rounded
    # What the projections read; under tensor parallelism gathered to all tokens.
    kept = 0 if is_made_again else 2 * tokens * hidden * p
    kept += attention_bytes(sizes, run)
    if sizes.qk_norm:
        kept += head_norm_bytes(sizes, run)
    if run.compiled:
        # The compiler's cut keeps what a matrix product of backward reads, and computes the rest
        # again: the residual before each norm, gate and up, and their product.
        kept += 2 * own * (hidden * p + 4)
        kept += (2 if is_made_again else 3) * tokens * inner * p // run.tensor
    else:
        kept += 2 * norm_bytes(sizes, run, own)
        # gate, silu(gate), up, and the product that down_proj reads.
        kept += 4 * tokens * inner * p // run.tensor
    return kept


def _adapted_layer_bytes(sizes: ModelSizes, adapters: Adapters, run: RunSizes, layer: int) -> int:
    """As `layer_bytes`, where adapters alone are trained.

    Frozen products keep nothing of what they read; adapters do. Nothing is kept of what has no
    gradient: that is all before the first adapter.
    """
    if layer < adapters.first:
        return 0
    here = sizes.adapted(layer)
    p, tokens, own = run.param_bytes, run.tokens, run.tokens // run.tensor
    inner = tokens * sizes.intermediate_size * p // run.tensor
    norm = own * (sizes.hidden_size * p + 4) if run.compiled else norm_bytes(sizes, run, own)
    reads = {'q_proj', 'k_proj', 'v_proj'} & here
    goes_in, attends = layer > adapters.first, layer > adapters.first or bool(reads)
    kept = norm if goes_in else 0
    if attends:
        kept += attention_bytes(sizes, run)
        if sizes.qk_norm:
            kept += head_norm_bytes(sizes, run)
    elif 'o_proj' in here:
        kept += tokens * sizes.num_heads * sizes.head_dim * p // run.tensor
    if attends or 'o_proj' in here:
        kept += norm
    # gate and up, and where nothing is computed again silu(gate)
    kept += (2 if run.compiled else 3) * inner
    if not adapters.dropout:
        # Adapters that read the same share it.
        kept += (
            tokens * sizes.hidden_size * p * (bool(reads) + bool({'gate_proj', 'up_proj'} & here))
        )
        kept += inner if 'down_proj' in here else 0
    for name in here:
        kept += _adapter_bytes(sizes, adapters, run, name)
    return kept


def _adapter_bytes(sizes: ModelSizes, adapters: Adapters, run: RunSizes, name: str) -> int:
    """Kept by one adapter, but for an input that it shares with others.

    That is what `lora_B` reads; inputs of which some were dropped, with a byte for which; and for
    lengths of rows the product that they scale.
    """
    into, out = linear_widths(sizes, run, name)
    kept = run.tokens * adapters.rank * run.param_bytes
    if adapters.dropout:
        kept += run.tokens * into * (run.param_bytes + (0 if run.compiled else 1))
    if adapters.lengths:
        products = 2 if adapters.dropout else 1
        kept += products * run.tokens * out * run.param_bytes
    return kept


def linear_widths(sizes: ModelSizes, run: RunSizes, name: str) -> tuple[int, int]:
    """Width of what one rank's linear layer reads and of what it gives, as of 'q_proj'."""
    heads = {'q_proj': sizes.num_heads, 'k_proj': sizes.num_kv_heads, 'v_proj': sizes.num_kv_heads}
    wide = sizes.num_heads * sizes.head_dim
    if name in heads:
        return sizes.hidden_size, heads[name] * sizes.head_dim // run.tensor
    if name == 'o_proj':
        return wide // run.tensor, sizes.hidden_size
    if name == 'down_proj':
        return sizes.intermediate_size // run.tensor, sizes.hidden_size
    return sizes.hidden_size, sizes.intermediate_size // run.tensor


def norm_bytes(sizes: ModelSizes, run: RunSizes, tokens: int) -> int:
    """Kept by one RMSNorm that is not compiled, but for its output, which its reader keeps.

    Its input in fp32 or wider (in these precisions the residual itself), a factor for each token,
    and where the scale is trained the normalised input before it.
    """
    scaled = run.param_bytes if sizes.adapters is None else 0
    return tokens * (sizes.hidden_size * (run.master_bytes + scaled) + run.master_bytes)


def head_norm_bytes(sizes: ModelSizes, run: RunSizes) -> int:
    """Kept by the norms of queries and keys, as `norm_bytes` of each head.

    The compiler keeps what the norms read and computes the rest again.
    """
    heads = run.tokens * (sizes.num_heads + sizes.num_kv_heads) // run.tensor
    if run.compiled:
        return heads * (sizes.head_dim * run.param_bytes + 4)
    scaled = run.param_bytes if sizes.adapters is None else 0
    return heads * (sizes.head_dim * (run.master_bytes + scaled) + run.master_bytes)


def attention_bytes(sizes: ModelSizes, run: RunSizes) -> int:
    """Kept by rotation and attention: q, k, v, the result, and each row's log-sum in fp32."""
    p, tokens = run.param_bytes, run.tokens
    queries = tokens * sizes.num_heads * sizes.head_dim * p // run.tensor
    # Context parallelism keeps the keys and values of whole rows.
    keys = tokens * run.context * sizes.num_kv_heads * sizes.head_dim * p // run.tensor
    sums = 4 * tokens * sizes.num_heads // run.tensor
    kept = 2 * queries + 2 * keys + sums
    if run.context > 1 and run.context_kernel:
        kept += queries  # the kernel's chunks, and the two put together
    return kept + run.mask * tokens * run.seq_len


def rotary_bytes(sizes: ModelSizes, run: RunSizes) -> int:
    """The table of cosines and sines in fp32, made once for all layers of a micro-batch."""
    return 4 * run.tokens * sizes.head_dim


def input_bytes(sizes: ModelSizes, run: RunSizes) -> int:
    """A layer's input."""
    return run.tokens // run.tensor * sizes.hidden_size * run.param_bytes


def recomputed_bytes(sizes: ModelSizes, run: RunSizes, layer: int = 0) -> int:
    """What a layer that recomputes keeps for one micro-batch; `layer` as of `layer_bytes`."""
    if sizes.adapters is not None and layer < sizes.adapters.first:
        return 0
    kept = input_bytes(sizes, run)
    if run.selective:
        # What matrix products and attention gave: q, k, v, the result and its log-sums, what o
        # and down give before ranks add it up, gate and up. Compiled layers do not keep what down
        # gives, and where two products are added their sum only; but a factor for each norm.
        p, tokens = run.param_bytes, run.tokens
        queries = tokens * sizes.num_heads * sizes.head_dim // run.tensor
        keys = tokens * sizes.num_kv_heads * sizes.head_dim // run.tensor
        inner = tokens * sizes.intermediate_size // run.tensor
        outputs = 1 if run.compiled else 2
        kept += (2 * queries + 2 * keys + outputs * tokens * sizes.hidden_size + 2 * inner) * p
        kept += 4 * tokens * sizes.num_heads // run.tensor
        if run.compiled:
            kept += 2 * 4 * tokens // run.tensor
        for name in sizes.adapted(layer):  # both products of an adapter
            assert sizes.adapters is not None
            second = 0 if run.compiled else linear_widths(sizes, run, name)[1]
            kept += tokens * (sizes.adapters.rank + second) * p
    return kept


def recomputed(run: RunSizes, layers: int) -> int:
    """How many of a part's layers are recomputed."""
    return max(round(layers * run.recompute), run.recompute > 0)


def kept_bytes(
    sizes: ModelSizes, run: RunSizes, layers: Sequence[int], first: bool, last: bool
) -> int:
    """Kept for one micro-batch by a part of a model, without what the loss keeps.

    Args:
        sizes: Of the model.
        run: Of the run.
        layers: Numbers of the layers in the part.
        first: Whether the part begins with the embedding, which keeps the token ids.
        last: Whether it ends with the last norm, which is never compiled.
    """
    again = recomputed(run, len(layers))
    kept = sum(recomputed_bytes(sizes, run, layer) for layer in layers[:again])
    kept += sum(layer_bytes(sizes, run, layer) for layer in layers[again:])
    if layers:
        kept += rotary_bytes(sizes, run)
    if first and sizes.adapters is None:
        kept += 8 * run.tokens
    if last:
        kept += norm_bytes(sizes, run, run.tokens // run.tensor)
    return kept


def loss_bytes(sizes: ModelSizes, run: RunSizes) -> int:
    """Kept by the loss, which computes its gradients in forward.

    The head's gradient in fp32 or wider, and that of the hidden states. A loss of pairs, which
    knows its gradients in backward alone, keeps the hidden states if the head is trained; one of
    rewards keeps those of the last token of each answer, of which a row is taken to have two.
    """
    hidden = run.tokens * sizes.hidden_size * run.param_bytes
    if not sizes.has_head:
        return 2 * run.micro_batch_size * sizes.hidden_size * run.master_bytes
    if sizes.compares_pairs or not sizes.trains_head:
        return hidden
    return sizes.vocab_size // run.tensor * sizes.hidden_size * run.master_bytes + hidden


def logits_bytes(sizes: ModelSizes, run: RunSizes) -> int:
    """The most that is held of logits: a chunk's, in several forms at once.

    While a chunk's log-probabilities are computed: its logits, in half precision also their fp32
    copy, and the log-probabilities in fp32 or wider; besides, of the chunk before, its
    log-probabilities and its gradient, which in wide precisions are one tensor. Where a kernel puts
    the gradient in their place, there is nothing but the logits.
    """
    if not sizes.has_head:
        return 0
    chunk = min(run.chunk_tokens, run.tokens)
    if run.loss_in_place:
        return chunk * sizes.vocab_size * run.param_bytes
    half = run.param_bytes < 4
    now = run.param_bytes + run.master_bytes * (2 if half else 1)
    before = run.master_bytes + (run.param_bytes if half else 0)
    each = now + (before if chunk < run.tokens else 0)
    return chunk * (sizes.vocab_size // run.tensor) * each


def in_flight(run: RunSizes, pipeline_rank: int) -> float:
    """Micro-batches whose activations a rank holds at most, counted in whole parts of the rank.

    A rank with several stages may hold more micro-batches of one of them than of another; these
    are counted by the share of the rank's stages.
    """
    ranks, per_rank = len(run.stages_of_rank), len(run.stages_of_rank[0])
    if ranks == 1:
        return 1
    if run.schedule == 'gpipe':
        return run.micro_batches
    if run.schedule == '1f1b':
        return min(run.micro_batches, ranks - pipeline_rank)
    if run.schedule == 'zbv_zero_bubble':
        # 2 * ranks stages at most, on every rank alike (https://arxiv.org/abs/2401.10241, 6).
        return min(run.micro_batches, ranks)
    # Interleaved: forwards before the first backward, and the one that precedes each backward
    # (https://arxiv.org/abs/2104.04473, 2.2). A schedule that is not known is taken for one.
    hops = 2 * (ranks - 1 - pipeline_rank)
    if run.schedule == 'interleaved_zero_bubble':
        # Fewer forwards before the first backward, but what gradients of weights are made of waits
        # for them; measured, it comes to this on every rank.
        hops = ranks
    warm_up = hops + (per_rank - 1) * ranks
    return min(run.micro_batches * per_rank, warm_up + 1) / per_rank
