"""Data parallelism: parameters, gradients and optimizer state sharded over ranks (FSDP2, HSDP)."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

RESHARD = ('step', 'layer')
"""When gathered parameters are given up: after the step's last backward, or after every layer."""


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated layers of a model: what is sharded, compiled and recomputed one by one.

    A model offers them as `layers`, an `nn.ModuleDict` or `nn.ModuleList`. One without is treated
    whole.
    """
    layers = getattr(model, 'layers', None)
    if isinstance(layers, nn.ModuleDict):
        yield from layers.values()
    elif isinstance(layers, nn.ModuleList):
        yield from layers


def shard_model(
    model: nn.Module,
    mesh: DeviceMesh,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard: str,
) -> None:
    """Shard every layer, then what is left, in place.

    Args:
        model: On the meta device or not; its parameters become DTensors in their own dtype, the
            masters.
        mesh: Axes (shard,) or (replicate, shard).
        param_dtype: What layers compute in.
        reduce_dtype: What gradients are summed in.
        reshard: See `RESHARD`.
    """
    # Inputs are not cast: activations have the parameters' dtype already, rotary tables stay fp32.
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
    )
    # The outermost unit is needed at both ends of the step; giving it up in between gains nothing.
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard == 'layer')
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the step's tokens over all ranks, so gradients add up.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def begin_micro_batch(model: nn.Module, is_last: bool, reshard: str) -> None:
    """Reduce gradients, and give parameters up, only in a step's last micro-batch.

    Args:
        model: A model that `shard_model` has sharded; any other is left alone.
        is_last: Whether this is the step's last micro-batch.
        reshard: See `RESHARD`.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
        model.set_is_last_backward(is_last)
        model.set_reshard_after_backward(is_last or reshard == 'layer')
