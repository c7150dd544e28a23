"""What a rank holds from step to step, as far as it is known before a model is placed."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from internlm_mm.engine.memory_budget import unplaced_optimizer
from internlm_mm.engine.rehearse_memory import state_bytes
from internlm_mm.parallel.float8 import Float8, rounded_weights
from internlm_mm.parallel.mesh import Layout
from internlm_mm.utils.host_memory import total_memory

_MOST_TIMES_THE_MASTERS = 6
"""Where so much fits, whatever optimizers are known to keep does: none is built to be asked."""


class Held(NamedTuple):
    """Bytes of one rank, where pipeline stages are alike.

    Attributes:
        states: Masters in full precision, and what the optimizer keeps; all sharded.
        gradients: In the precision of the reduction.
        frozen: Weights that do not train.
        gathered: Whole weights that ranks share between steps.
    """

    states: float
    gradients: float
    frozen: float
    gathered: float


def held_bytes(
    model: nn.Module,
    layout: Layout,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    *,
    reshard: str = 'step',
    offload: bool = False,
    float8: Float8 | None = None,
    optimizer: Any = None,
    unknown: int = 2,
) -> Held:
    """What a rank of a layout holds.

    Args:
        model: Whole; on the meta device will do.
        layout: Of the job.
        param_dtype: What layers compute in.
        reduce_dtype: What gradients are summed in.
        reshard: See `internlm_mm.parallel.data.RESHARD`.
        offload: Whether all of it lies in host memory.
        float8: How matrix products are rounded to 8 bits, or None.
        optimizer: Built on the model; None for weights alone, which do not train.
        unknown: How many numbers for each parameter an optimizer that is not known is taken to
            keep; 0 for what it surely takes.
    """
    rounded = rounded_weights(model, float8)
    counts, narrow = [0, 0], 0
    for name, parameter in model.named_parameters():
        counts[parameter.requires_grad] += parameter.numel()
        narrow += parameter.numel() if name in rounded else 0
    parts = layout.pipeline * layout.tensor
    frozen, trained = (count / parts for count in counts)
    master = 8 if param_dtype == torch.float64 else 4
    shards = layout.data_shard * layout.context
    states = trained * master / shards
    gradients = 0.0
    if optimizer is not None:
        states += state_bytes(optimizer, master, unknown) / parts / shards
        gradients = trained * reduce_dtype.itemsize / shards
    itemsize = param_dtype.itemsize
    whole = shards == 1 or (reshard == 'never' and not offload)  # as `left_whole`
    gathered = (trained + (0 if whole else frozen)) * itemsize if shards > 1 else 0.0
    gathered -= narrow / parts * (itemsize - 1) if shards > 1 else 0.0
    return Held(states, gradients, frozen * itemsize / (1 if whole else shards), gathered)


def beyond_this_machine(held: Held, ranks: int, is_on_host: bool) -> str | None:
    """Why memory of this machine cannot hold it, whatever the activations; None if it might.

    Args:
        held: Of one rank.
        ranks: How many of them are on this machine.
        is_on_host: Whether all of it lies in host memory; else nothing does.
    """
    memory = total_memory()
    needed = ranks * (held.states + held.gradients + held.frozen)
    if not is_on_host or memory is None or needed <= memory:
        return None
    of = 'one process' if ranks == 1 else f'{ranks} processes'
    return (
        f'weights, gradients and optimizer state of {of} take {needed / 2**30:.1f} GiB of host '
        f'memory, and this machine has {memory / 2**30:.1f}'
    )


def check_host_memory(runner: Any, training: bool) -> None:
    """Refuse what this machine's memory cannot hold, before the system ends the process for it.

    Args:
        runner: Its model is whole, its optimizer still a config.
        training: Whether there will be gradients and an optimizer.

    Raises:
        ValueError: With what is needed and what there is.
    """
    strategy = runner.strategy
    techniques = getattr(strategy, 'techniques', None)
    if techniques is None or not (techniques.offload or strategy.device.type == 'cpu'):
        return
    held_by = partial(
        held_bytes,
        runner.model,
        strategy.layout,
        techniques.param_dtype,
        techniques.reduce_dtype,
        reshard=techniques.reshard,
        offload=techniques.offload,
        float8=techniques.float8,
        unknown=0,
    )
    held = held_by()
    memory = total_memory()
    most = _MOST_TIMES_THE_MASTERS * held.states + held.frozen
    if memory is None or strategy.local_size * most <= memory:
        return
    if training:
        optimizer = unplaced_optimizer(runner.optim_wrapper, runner.model)
        held = held_by(optimizer=optimizer)
    why = beyond_this_machine(held, strategy.local_size, True)
    if why is not None:
        raise ValueError(f'{why}; --rehearse N tells what each of N GPUs would hold')
