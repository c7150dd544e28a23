"""From the built parts of a run to the sizes that the planner reckons with."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Adam, AdamW

from internlm_mm.optim import CompactAdamW, FusedAdam
from internlm_mm.parallel.adapters import is_adapted
from internlm_mm.parallel.float8 import rounded_weights
from internlm_mm.parallel.mesh import Layout
from internlm_mm.parallel.pipeline_plan import PipelinePlan
from internlm_mm.parallel.place import Techniques
from internlm_mm.parallel.recompute import SELECTIVE
from internlm_mm.planner import ModelSizes, RunSizes, StateSize
from internlm_mm.planner.memory import rank_parameters
from internlm_mm.planner.sizes import Adapters, layer_parameters, outer_parameters
from internlm_mm.utils.loss_chunk import loss_chunk

SIZES = (
    'hidden_size',
    'intermediate_size',
    'num_heads',
    'num_kv_heads',
    'head_dim',
    'vocab_size',
    'attention_bias',
)
"""Attributes by which a model says what it is made of."""

FURTHER = ('output_bias', 'qk_norm', 'tie_word_embeddings')
"""Likewise, but a model may be silent about them."""


def model_sizes(model: nn.Module) -> ModelSizes | None:
    """Sizes of a decoder.

    None for a model that does not tell them, or has frozen weights for other reasons than adapters.
    """
    if not all(hasattr(model, name) for name in (*SIZES, 'layers')):
        return None
    known = {name: getattr(model, name) for name in (*SIZES, *FURTHER) if hasattr(model, name)}
    objective = getattr(model, 'objective', None)
    sizes = ModelSizes(
        num_layers=len(model.layers),  # type: ignore[arg-type]
        has_head=not getattr(objective, 'replaces_head', False),
        compares_pairs=getattr(objective, 'takes_pairs', False),
        adapters=_adapters(model),
        **known,
    )
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    shapes = outer_parameters(sizes, True, True)
    for layer in range(sizes.num_layers):
        shapes += layer_parameters(sizes, layer)
    expected = {one.name for one in shapes if one.trained}
    is_frozen = any(not weight.requires_grad for weight in model.parameters())
    return None if is_frozen and trained != expected else sizes


def _adapters(model: nn.Module) -> Adapters | None:
    """What a model says of its adapters, which are all of one kind; None if it has none."""
    layers = {name: part for name, part in model.named_modules() if is_adapted(part)}
    if not layers:
        return None
    one: Any = next(iter(layers.values()))
    return Adapters(
        rank=one.lora_A.weight.shape[0],
        layers=frozenset(layers),
        lengths=one.lora_magnitude_vector is not None,
        dropout=bool(one.dropout),
        four_bit=one.four_bit,
    )


def run_sizes(
    layout: Layout,
    techniques: Techniques,
    plan: PipelinePlan | None,
    step: Mapping[str, Any],
    *,
    model: nn.Module,
    optimizer: Any,
    packed: bool,
    has_mask: bool,
    has_kernel: bool,
) -> RunSizes:
    """What decides about memory.

    Args:
        layout: Of the job.
        techniques: What is done to the model; `recompute` no budget any more.
        plan: Of the pipeline, or None.
        step: `seq_len`, `micro_batch_size`, `micro_batches_at_most`.
        model: Whole.
        optimizer: Built on it.
        packed: Whether a row may hold several documents.
        has_mask: Whether attention on packed rows needs a mask.
        has_kernel: Whether ranks that share a sequence attend by a kernel, without a mask.
    """
    names = list(getattr(model, 'layers', ()))
    number = {name: index for index, name in enumerate(names)}
    stages = plan.layers if plan else (tuple(names),)
    param, reduce = techniques.param_dtype.itemsize, techniques.reduce_dtype.itemsize
    selective = techniques.recompute == SELECTIVE
    objective = getattr(model, 'objective', None)
    # As the loss decides on a GPU, which is what is rehearsed.
    is_plain = not getattr(objective, 'takes_pairs', False) and layout.tensor == 1
    in_place = is_plain and getattr(objective, 'label_smoothing', None) == 0
    masked = not has_kernel if layout.context > 1 else packed and has_mask
    return RunSizes(
        seq_len=step['seq_len'],
        micro_batch_size=step['micro_batch_size'],
        micro_batches=step['micro_batches_at_most'],
        stages=tuple(tuple(number[name] for name in stage) for stage in stages),
        stages_of_rank=tuple(
            tuple(plan.stages_of(rank)) if plan else (0,) for rank in range(layout.pipeline)
        ),
        data_replicate=layout.data_replicate,
        data_shard=layout.data_shard,
        context=layout.context,
        tensor=layout.tensor,
        param_bytes=param,
        reduce_bytes=reduce,
        in_8_bits=rounded_weights(model, techniques.float8),
        sharded=techniques.needs_mesh(layout.world_size),
        reshard=techniques.reshard,
        recompute=1.0 if selective else float(techniques.recompute),  # type: ignore[arg-type]
        selective=selective,
        compiled=techniques.compile,
        rounded=techniques.float8 is not None and techniques.float8.rounds_inputs_again,
        schedule=plan.schedule if plan else '1f1b',
        mask=param if masked else 0,
        context_kernel=has_kernel,
        chunk_tokens=loss_chunk(getattr(objective, 'chunk_tokens', step['seq_len']), in_place),
        loss_in_place=in_place,
        moments=_moments(optimizer, optimizer.defaults),
        states=_states(optimizer, model, max(4, param)),
        # Without fused kernels AdamW holds the denominators of all parameters at once.
        optimizer_copies=0 if optimizer.defaults.get('fused') or _goes_singly(optimizer) else 1,
        offload=techniques.offload,
    )


def unknown_parameters(
    built: Mapping[str, int], sizes: ModelSizes, run: RunSizes, coordinate: Mapping[str, int]
) -> list[str]:
    """Names of parameters whose size on a rank is not what the planner takes it for.

    Args:
        built: Numbers that the rank holds of each parameter.
        sizes: Of the model.
        run: Of the run.
        coordinate: Where the rank stands.
    """
    index = coordinate['data_shard'] * run.context + coordinate['context']
    expected = {
        one.name: one.sharded(run.tensor, run.shards, index)
        for one in rank_parameters(sizes, run, coordinate['pipeline'])
    }
    return sorted(name for name in {*built, *expected} if built.get(name) != expected.get(name))


def state_bytes(optimizer: torch.optim.Optimizer, master_bytes: int, unknown: int = 2) -> float:
    """What an optimizer keeps for all its parameters, but for counts of steps.

    Args:
        optimizer: Built on the whole model.
        master_bytes: Of one number of a master.
        unknown: How many numbers for each parameter one that is not known is taken to keep.
    """
    total = 0.0
    for group in optimizer.param_groups:
        usual = _moments(optimizer, group, unknown) * master_bytes
        for parameter in group['params']:
            each: float = usual
            if hasattr(optimizer, 'state_bytes'):
                each = optimizer.state_bytes(parameter, group, master_bytes)[0]
            total += each * parameter.numel()
    return total


def _states(
    optimizer: torch.optim.Optimizer, model: nn.Module, master_bytes: int
) -> dict[str, StateSize]:
    """What an optimizer says of itself; nothing if it is silent."""
    if not hasattr(optimizer, 'state_bytes'):
        return {}
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        named[id(parameter)]: StateSize(*optimizer.state_bytes(parameter, group, master_bytes))
        for group in optimizer.param_groups
        for parameter in group['params']
        if id(parameter) in named
    }


def _goes_singly(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it needs no further number for each parameter while it steps."""
    return isinstance(optimizer, (CompactAdamW, FusedAdam))


def _moments(optimizer: torch.optim.Optimizer, options: Mapping[str, Any], unknown: int = 2) -> int:
    """Numbers that the optimizer keeps for each parameter of a group with such options."""
    if isinstance(optimizer, (Adam, AdamW)):
        return 3 if options['amsgrad'] else 2
    if isinstance(optimizer, torch.optim.SGD):
        return 1 if options['momentum'] else 0
    return unknown
